package agent

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

// What a processor would run, told from memory alone: neither records nor
// documents of the daemon are asked, and no operation of the backend is spent.

// where tells what a call of an export runs: "old" (the base image itself), or
// the id of the release whose annex it leads to.
func (r *rig) where(pid int, module, export string) (string, error) {
	at, err := r.m.Export(pid, module, export)
	if err != nil {
		return "", err
	}
	to, err := r.m.Executes(pid, at)
	if err != nil {
		return "", err
	}
	return r.owner(pid, module, to)
}

// owner names whose code lies at an address.
func (r *rig) owner(pid int, module string, at target.Addr) (string, error) {
	span, err := r.m.Module(pid, module)
	if err != nil {
		return "", err
	}
	if span.Contains(at) {
		return "old", nil
	}
	// An annex begins at a multiple of 64 KiB with its header.
	const grain, most = 64 << 10, 64
	for i := range target.Addr(most) {
		begin := at&^(grain-1) - i*grain
		fixed, err := r.m.Peek(pid, begin, 48)
		if err != nil || string(fixed[:8]) != "HPANNEX\x01" {
			continue
		}
		body, err := r.m.Peek(pid, begin+48, int(binary.LittleEndian.Uint32(fixed[8:])))
		if err != nil {
			return "", err
		}
		if sum := sha256.Sum256(body); !slices.Equal(sum[:], fixed[16:48]) {
			return "", fmt.Errorf("the annex header at %s does not have the hash it names", begin)
		}
		var h struct {
			Release string `json:"release"`
			Size    uint64 `json:"size"`
		}
		if err := json.Unmarshal(body, &h); err != nil {
			return "", err
		}
		if at < begin+target.Addr(h.Size) {
			return h.Release, nil
		}
	}
	return "", fmt.Errorf("%s of process %d leads to %s, which is neither the image nor an annex", module, pid, at)
}

// trace records what an export runs, each time that changes while threads run.
type trace struct {
	mu   sync.Mutex
	seen []target.Addr
	bad  error
}

// follow looks at an export before every operation from now on.
func (r *rig) follow(pid int, module, export string) *trace {
	x := &trace{}
	look := func() {
		if r.m.Stopped(pid) {
			return
		}
		at, err := r.m.Export(pid, module, export)
		if err != nil {
			return
		}
		to, err := r.m.Executes(pid, at)
		x.mu.Lock()
		defer x.mu.Unlock()
		if err != nil {
			x.bad = err
			return
		}
		if n := len(x.seen); n == 0 || x.seen[n-1] != to {
			x.seen = append(x.seen, to)
		}
	}
	look()
	r.m.FailAt(1, sim.Fault{Times: -1, Do: sim.Hook, Then: look})
	return x
}

// walked names what was run, in order.
func (r *rig) walked(pid int, module string, x *trace) (string, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.bad != nil {
		return "", x.bad
	}
	var names []string
	for _, at := range x.seen {
		name, err := r.owner(pid, module, at)
		if err != nil {
			return "", err
		}
		names = append(names, name)
	}
	return strings.Join(names, " "), nil
}

// all tells what the exports of a module run, if they agree: "old", a release,
// or an error that names the mix. Exports that no release replaces are left out by the caller.
func (r *rig) all(pid int, module string, exports ...string) (string, error) {
	found := map[string][]string{}
	for _, e := range exports {
		w, err := r.where(pid, module, e)
		if err != nil {
			return "", err
		}
		found[w] = append(found[w], e)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s of process %d runs a mix: %v", module, pid, found)
	}
	for w := range found {
		return w, nil
	}
	return "", nil
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
