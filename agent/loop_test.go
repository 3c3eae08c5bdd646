package agent

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// A busy image is tried again by itself, long before the next scan; and while
// nothing waits, the loop sleeps.
func TestBusyIsTriedAgainWithoutAWake(t *testing.T) {
	rva, err := rvaOf("mingw/app.dll", "vuln")
	must(t, err)
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1, Processes: []sim.Process{{PID: sweepPID,
		Modules: []sim.Module{{File: "mingw/app.dll"}}, Threads: []sim.Thread{{ID: 177, PC: fmt.Sprintf("app.dll!+%#x", rva+1)}}}}})
	r.cfg.Backend.ScanEvery = longScan
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	defer func() { must(t, r.stop()) }()
	must(t, r.until(func() string {
		row, err := r.row(sweepPID)
		if err != nil || row == nil || row.State != control.Busy || row.Attempts < 2 {
			return fmt.Sprintf("%+v %v", row, err)
		}
		return ""
	}))
	must(t, r.until(func() string { return said(r.m.MoveThread(sweepPID, 177, fmt.Sprintf("app.dll!+%#x", rva+60))) }))
	must(t, r.until(func() string { return said(r.agree("R1")) }))
	// A pass that was under way may still end; after it nobody looks.
	must(t, r.life.agent.Alive(context.Background()))
	before := r.m.Ops()
	for range 5 {
		must(t, r.life.agent.Alive(context.Background()))
	}
	if n := r.m.Ops() - before; n > 1 {
		t.Errorf("%d operations while nothing is to be done", n)
	}
	must(t, r.judge())
}

// An attempt whose turn comes between the last round and its publication is due
// at once: nothing else would bring it about.
func TestTurnThatComesBeforePublication(t *testing.T) {
	r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1, Processes: []sim.Process{{PID: sweepPID,
		Modules: []sim.Module{{File: "mingw/app.dll"}}, Guards: []sim.Guard{{Code: "tracer", Text: "traced by strace, pid 31211"}}}}})
	r.cfg.Backend.ScanEvery = longScan
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
	must(t, r.start())
	defer func() { must(t, r.stop()) }()
	must(t, r.until(func() string {
		row, err := r.row(sweepPID)
		if err != nil || row == nil || row.State != control.Blocked {
			return fmt.Sprintf("%+v %v", row, err)
		}
		return ""
	}))
	a, due := r.life.agent, false
	must(t, a.call(context.Background(), func() {
		r.clock.Add(int64(guardAgain))
		a.publish()
		due = a.due()
	}))
	if !due {
		t.Error("the attempt waits for something else to change")
	}
	must(t, r.until(func() string { return said(r.m.SetGuards(sweepPID)) }))
	r.clock.Add(int64(guardAgain)) // it may have been tried before
	must(t, r.until(func() string { return said(r.agree("R1")) }))
	must(t, r.judge())
}

// forge makes an annex header that claims to be in force in app.dll: it has
// taken vuln out, which therefore stands as it always did.
func forge(t *testing.T, base target.Addr, rva uint32, product, id string, bytes []byte) []any {
	t.Helper()
	body, err := json.Marshal(map[string]any{
		"nonce": strings.Repeat("0", 32), "base": base, "size": 0x10000, "identity": pe.Identity{SizeOfImage: 0xb000}, "image": "app.dll",
		"product": product, "release": id, "sequence": 1, "hash": strings.Repeat("0", 64), "parts": []target.Span{}, "header": strings.Repeat("0", 64),
		"sites": []patcher.Site{{Function: "vuln", RVA: rva, Length: uint32(len(bytes)), At: base + target.Addr(rva), Original: bytes, Canonical: bytes, Prev: bytes, New: bytes}},
	})
	must(t, err)
	b := append([]byte("HPANNEX\x01"), make([]byte, 40)...)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	sum := sha256.Sum256(body)
	copy(b[16:], sum[:])
	b = append(b, body...)
	var words []any
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	for i := 0; i < len(b); i += 8 {
		words = append(words, binary.LittleEndian.Uint64(b[i:]))
	}
	return words
}

// A process whose memory claims to be patched by us is not believed: what is no
// id is passed over, and a release that is named falsely is said to be so.
func TestForgedClaims(t *testing.T) {
	t.Parallel()
	rva, err := rvaOf("mingw/app.dll", "vuln")
	must(t, err)
	const base = 0x7100_0000_0000
	first, err := hex.DecodeString("0000000000")
	must(t, err)
	plain, err := sim.New(&sim.Scene{Format: sim.SceneFormat, Processes: []sim.Process{{PID: 1, Modules: []sim.Module{{File: "mingw/app.dll", Base: base}}}}}, sceneFiles())
	must(t, err)
	first, err = plain.Peek(1, base+target.Addr(rva), len(first))
	must(t, err)
	for _, c := range []struct {
		product, id string
		state       control.ImageState
		code        string
	}{
		{"app", "\x1b[31mR1", control.Patched, ""},
		{"app", strings.Repeat("R", 1000), control.Patched, ""},
		{"../app", "R1", control.Patched, ""},
		{"app", "R1", control.Drifted, "claim"},
		{"app", "R9", control.Blocked, "unknown-release"},
	} {
		r := newRig(t, &sim.Scene{Format: sim.SceneFormat, Seed: 1, Processes: []sim.Process{{PID: sweepPID,
			Modules: []sim.Module{{File: "mingw/app.dll", Base: base}},
			Regions: []sim.Region{{At: uint64(base + 0x10_0000), Size: 0x10000, Prot: "r--", Words: forge(t, base, rva, c.product, c.id, first)}}}}})
		must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "R1", Product: "app", Sequence: 1}, image{"mingw/app-ref-1.dll"}))
		must(t, r.start())
		err := r.until(func() string {
			row, err := r.row(sweepPID)
			if err != nil || row == nil || row.State != c.state || row.ReasonCode != c.code {
				return fmt.Sprintf("%+v %v", row, err)
			}
			return ""
		})
		if err != nil {
			t.Errorf("%.20q of %q: %v", c.id, c.product, err)
		}
		doc, err := r.life.client.Processes(context.Background(), control.ProcessQuery{})
		must(t, err)
		if text := fmt.Sprintf("%+v", doc); strings.Contains(text, "\x1b") || strings.Contains(text, "RRRR") || strings.Contains(text, "../app") {
			t.Errorf("it is repeated: %s", text)
		}
		if c.state != control.Patched && r.m.Count(sim.OpWrite) > 0 {
			t.Error("something was written on the word of foreign memory")
		}
		must(t, r.judge())
		must(t, r.stop())
	}
}

// Many processes, some of which go away meanwhile: all that are left are
// patched, and the next look at them costs one list and nothing for each.
func TestManyProcesses(t *testing.T) {
	const many = 300
	scene := &sim.Scene{Format: sim.SceneFormat, Seed: 2}
	for i := range many {
		scene.Processes = append(scene.Processes, sim.Process{PID: 200 + i, Modules: []sim.Module{{File: "demo/demo.dll"}}})
	}
	r := newRig(t, scene)
	r.cfg.Backend.ScanEvery = 2 * time.Second
	must(t, r.publish(repository.PublishOptions{}, &release.Manifest{ID: "D1", Product: "demo", Sequence: 1}, image{"demo/demo-1.dll"}))
	// Every tenth goes when its threads are about to be stopped.
	for i := 0; i < many; i += 10 {
		r.m.FailAt(1, sim.Fault{Do: sim.Exit, Op: sim.OpFreeze, PID: 200 + i})
	}
	must(t, r.start())
	defer func() { must(t, errors.Join(r.judge(), r.stop())) }()
	ctx := context.Background()
	must(t, r.until(func() string {
		st, err := r.life.client.Status(ctx)
		if err != nil || st.State != control.Hotpatched || st.Coverage.Patched != many*9/10 || st.Coverage.Images != many*9/10 {
			return fmt.Sprintf("%+v %v", st, err)
		}
		return ""
	}))
	must(t, r.pass()) // sees what the patching itself has mapped
	before, opened := r.m.Ops(), r.m.Count(sim.OpOpen)
	must(t, r.pass())
	if n := r.m.Ops() - before; n > 5 || r.m.Count(sim.OpOpen)-opened > 1 {
		t.Errorf("%d operations for %d processes in which nothing has changed", n, many*9/10)
	}
	v, err := r.life.client.Verify(ctx)
	if err != nil || !v.OK || v.Processes != many*9/10 {
		t.Errorf("verify: %+v %v", v, err)
	}
}

// A decision that time alone has changed since the last round is carried out
// soon: nothing else would wake the loop for it.
func TestNextAgainOfNewWish(t *testing.T) {
	a := &Agent{o: Options{Now: func() time.Time { return noon }}}
	for name, c := range map[string]struct {
		in   Intent
		want time.Time
	}{
		"nothing":           {Intent{}, time.Time{}},
		"waits for time":    {Intent{Again: noon.Add(time.Hour)}, noon.Add(time.Hour)},
		"its turn has come": {Intent{Kind: DoApply, Try: &Try{Next: noon.Add(-time.Second)}}, noon.Add(-time.Second)},
		"a new wish":        {Intent{Kind: DoUndo}, noon.Add(busyAgain)},
	} {
		if got := a.nextAgain(View{Now: noon}, []Intent{c.in}); !got.Equal(c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
