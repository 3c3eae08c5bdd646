package patcher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// copies is a world whose process has loaded the base n times, and a fix that
// needs a look at other modules.
func copies(t *testing.T, n int) (*world, *Patch) {
	t.Helper()
	w := newWorld(t, func(p *sim.Process, f *forge) {
		f.imports = []pe.Import{{DLL: "dep.dll", Name: "A"}}
		p.Modules = []sim.Module{library("dep.dll", nil, code("A", 0))}
		p.Modules = append(p.Modules, sim.Module{File: "base.dll"})
		for i := range n - 1 {
			p.Modules = append(p.Modules, sim.Module{File: fmt.Sprintf("copy%d.dll", i), Image: f.bytes()})
		}
	})
	return w, release{sequence: 1, names: []string{"f"}, change: func(dll *forge, _ *pe.HotPatchSpec) {
		dll.imports = []pe.Import{{DLL: "dep.dll", Name: "A"}}
	}}.patch(t, w.file)
}

// What one turn of work costs follows the number of images, not its square.
func TestSurveyCostIsLinear(t *testing.T) {
	cost := map[int]int{}
	const few, many = 4, 32
	for _, n := range []int{few, many} {
		w, patch := copies(t, n)
		reads, lists := w.m.Count(sim.OpRead), w.m.Count(sim.OpRegions)
		s := Look(t.Context(), w.p)
		images, err := s.Images()
		if err != nil || len(images) != n+1 {
			t.Fatalf("%d images, %v", len(images), err)
		}
		planned := 0
		for _, l := range images {
			if l.Name != "base.dll" {
				continue
			}
			base, err := s.At(l.Base)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Prepare(base, patch); err != nil {
				t.Fatal(err)
			}
			planned++
		}
		if planned != n {
			t.Fatalf("%d plans for %d images", planned, n)
		}
		cost[n] = w.m.Count(sim.OpRead) - reads
		if got := w.m.Count(sim.OpRegions) - lists; got != 1 {
			t.Errorf("regions were listed %d times in one turn", got)
		}
	}
	if most := cost[few] * many / few * 5 / 4; cost[many] > most {
		t.Errorf("%d reads for %d images and %d for %d: at most %d are in proportion", cost[few], few, cost[many], many, most)
	}
}

// What was mapped in a turn counts in the rest of it: the next plan keeps clear
// of it, sees the patch in force, and what another product wrote.
func TestSurveySeesWhatWasMapped(t *testing.T) {
	w := newWorld(t)
	s := Look(t.Context(), w.p)
	bring := func(p *Patch) Record {
		t.Helper()
		base, err := s.At(w.base.Base)
		if err != nil {
			t.Fatal(err)
		}
		plan, err := s.Prepare(base, p)
		if err != nil {
			t.Fatal(err)
		}
		rec, err := w.x.Apply(t.Context(), w.p, plan)
		if err != nil || rec.State != Applied {
			t.Fatalf("%s %v", rec.State, err)
		}
		if plan.Reused {
			t.Error("an annex was reused")
		}
		return rec
	}
	first := bring(w.patch(1, "f", "g"))
	other := bring(release{product: "other", sequence: 7, names: []string{"r"}}.patch(t, w.file))
	second := bring(w.patch(2, "f", "g"))
	if w.all() != "22b7" {
		t.Fatal(w.all())
	}
	if second.Previous == nil || second.Previous.Annex != first.Annex {
		t.Error("the older sequence was not recognised")
	}
	if at := []target.Addr{first.Annex, other.Annex, second.Annex}; at[0] == at[1] || at[1] == at[2] || at[0] == at[2] {
		t.Errorf("annexes at %v", at)
	}
	base, err := s.At(w.base.Base)
	if err != nil {
		t.Fatal(err)
	}
	var already *AlreadyApplied
	if _, err := s.Prepare(base, w.patch(2, "f", "g")); !errors.As(err, &already) {
		t.Errorf("%v, want that it is in force", err)
	}
	claims, err := s.Claims()
	if err != nil || len(claims) != 2 {
		t.Errorf("claims %+v, %v", claims, err)
	}
	if _, err := s.At(w.base.Base + target.PageSize); !errors.Is(err, ErrUnloaded) {
		t.Errorf("behind the base: %v", err)
	}
	w.sound()
}

// A turn whose time is over ends in the middle of a walk.
func TestSurveyEndsWithItsTurn(t *testing.T) {
	w, patch := copies(t, 2)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := Look(ctx, w.p)
	if _, err := s.Images(); !errors.Is(err, context.Canceled) {
		t.Errorf("images: %v", err)
	}
	if _, err := s.Prepare(w.base, patch); !errors.Is(err, context.Canceled) {
		t.Errorf("plan: %v", err)
	}
	if _, err := s.Claims(); !errors.Is(err, context.Canceled) {
		t.Errorf("claims: %v", err)
	}
}

// page is memory that holds headers and nothing else, one at each place where
// an annex may begin.
type page struct {
	target.Process
	header []byte
	room   target.Addr // of each
	n      int
	read   int // bytes
}

const pageAt = 0x7200_0000_0000

func (p *page) Regions() ([]target.Region, error) {
	return []target.Region{{Start: pageAt, End: pageAt + target.Addr(p.n)*p.room, Prot: target.Read}}, nil
}

func (p *page) ReadAt(b []byte, at target.Addr) (int, error) {
	off := int((at - pageAt) % p.room)
	clear(b)
	if off < len(p.header) {
		p.read += copy(b, p.header[off:])
	}
	return len(b), nil
}

// headed gives a JSON text the fixed part of an annex header.
func headed(body []byte) []byte {
	b := append([]byte(annexMagic), make([]byte, annexFixed-len(annexMagic))...)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	sum := sha256.Sum256(body)
	copy(b[16:], sum[:])
	return append(b, body...)
}

// Headers that would unfold into much more than they are do not: neither one,
// nor as many as fit into a process.
func TestForgedHeadersStaySmall(t *testing.T) {
	fill := func(before, each, after string, n int) []byte {
		return []byte(before + strings.Repeat(each+",", (n-len(before)-len(after))/(len(each)+1)-1) + each + after)
	}
	const most = maxAnnexHeader
	site := `{"original":"AAAAAAA=","new":"AAAAAAA=","prev":"AAAAAAA=","canonical":"AAAAAAA=","pad":{}}`
	for name, body := range map[string][]byte{
		"empty sites":      fill(`{"sites":[`, "{}", `]}`, most),
		"empty ranges":     fill(`{"ranges":[`, "{}", `]}`, most),
		"null sites":       fill(`{"sites":[`, "null", `]}`, most),
		"boundaries":       fill(`{"sites":[{"interior":[`, "1", `]}]}`, most),
		"lists":            fill(`{"sites":[{"interior":[`, "[]", `]}]}`, most),
		"again and again":  fill(`{`, `"sites":[{},{}]`, `}`, most),
		"as many as fit":   fill(`{"sites":[`, "{}", `]}`, 3*maxHeaderObjects-100),
		"sites and pads":   fill(`{"sites":[`, site, `]}`, most),
		"braces in a name": fill(`{"image":"`, `{\"{[`, `"}`, most),
	} {
		p := &page{header: headed(body), room: alignUp(most+annexFixed, annexAlign) + annexAlign, n: 32}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		s := Look(t.Context(), p)
		claims, err := s.Claims()
		runtime.ReadMemStats(&after)
		if err != nil || len(claims) > 0 || len(s.annexes) > 0 {
			t.Errorf("%s: %d claims, %v", name, len(claims), err)
		}
		// All that was ever taken, long given back: more than was alive at any time.
		if n := after.TotalAlloc - before.TotalAlloc; n > 64<<20 {
			t.Errorf("%s: %d MB for headers of %d MB", name, n>>20, p.read>>20)
		}
		const fixed = 1 << 20 // of each place that is looked at
		if p.read > maxHeaders+fixed {
			t.Errorf("%s: %d bytes were read as headers of one process", name, p.read)
		}
		if _, err := s.Claims(); err != nil || p.read > maxHeaders+fixed {
			t.Errorf("%s: read again, %d bytes, %v", name, p.read, err)
		}
	}
}

// What we write ourselves is read back, the largest fix too.
func TestLargestHeaderIsRead(t *testing.T) {
	h := annexHeader{Nonce: strings.Repeat("0", 32), Base: 0x1000_0000, Size: 0x10_0000, Identity: pe.Identity{SizeOfImage: 0x100_0000},
		Image: "base.dll", Product: "p", Release: "r", Hash: strings.Repeat("0", 64), Header: strings.Repeat("0", 64)}
	at := target.Addr(0x1200_0000)
	for i := range maxFunctions {
		rva := 0x1000 + uint32(i)*0x40
		entry := h.Base + target.Addr(rva)
		s := Site{Function: strings.Repeat("x", maxName), RVA: rva, Length: 0x20, Kind: shapeShort, At: entry, Target: at + 0x1000, Slot: at + 0x1000,
			Original: []byte{1, 2}, Canonical: []byte{1, 2}, Prev: []byte{1, 2},
			Pad: &Pad{At: entry - longJump, Original: bytes.Repeat([]byte{0xcc}, longJump), Prev: bytes.Repeat([]byte{0xcc}, longJump)}}
		s.write()
		h.Sites = append(h.Sites, s)
		h.Ranges = append(h.Ranges, pe.Span{Begin: rva, End: rva + 1})
	}
	b, err := h.encode()
	if err != nil {
		t.Fatal(err)
	}
	m := &page{header: b, room: 1 << 32, n: 1}
	budget := headerBudget{bytes: maxHeaders, objects: maxObjects}
	// The header says where it lies; the memory is elsewhere.
	a, err := annexAt(moved{m, at}, at, 1<<32, &budget)
	if err != nil || len(a.Sites) != maxFunctions {
		t.Fatalf("%d sites, %v", len(a.Sites), err)
	}
	h.Sites = append(h.Sites, make([]Site, maxHeaderObjects)...)
	if _, err := h.encode(); err == nil || !strings.Contains(err.Error(), "limit") && !strings.Contains(err.Error(), "objects") {
		t.Errorf("a header that nobody can read is made: %v", err)
	}
}

// moved shows the memory of a page elsewhere.
type moved struct {
	*page
	to target.Addr
}

func (m moved) ReadAt(b []byte, at target.Addr) (int, error) { return m.page.ReadAt(b, at-m.to+pageAt) }

// tiled is a process that has mapped one image again and again.
type tiled struct {
	target.Process
	image []byte
	n     int
}

func (p tiled) Info() target.Info { return target.Info{ID: target.ID{PID: pid}} }

func (p tiled) Regions() ([]target.Region, error) {
	size := alignUp(target.Addr(len(p.image)), target.PageSize)
	var r []target.Region
	for i := range target.Addr(p.n) {
		r = append(r, target.Region{Start: pageAt + i*size, End: pageAt + (i+1)*size, Prot: target.Read | target.Exec, Kind: target.File, Path: "/x.dll"})
	}
	return r, nil
}

func (p tiled) ReadAt(b []byte, at target.Addr) (int, error) {
	size := alignUp(target.Addr(len(p.image)), target.PageSize)
	clear(b)
	copy(b, p.image[min(len(p.image), int((at-pageAt)%size)):])
	return len(b), nil
}

// More images than are looked at are an error that says so, never a shorter list.
func TestTooManyImages(t *testing.T) {
	im, err := baseImage().image(t).Place(forgeBase)
	if err != nil {
		t.Fatal(err)
	}
	p := tiled{image: im.Bytes, n: maxImages}
	if l, err := Images(p); err != nil || len(l) != maxImages {
		t.Errorf("%d images, %v", len(l), err)
	}
	p.n++
	if l, err := Images(p); !errors.Is(err, ErrTooManyImages) || l != nil {
		t.Errorf("%d images, %v", len(l), err)
	}
}

// Regions are found by halving.
func TestRegionAt(t *testing.T) {
	regions := []target.Region{{Start: 0x1000, End: 0x2000}, {Start: 0x2000, End: 0x3000}, {Start: 0x5000, End: 0x6000}}
	for at, want := range map[target.Addr]string{0: "", 0xfff: "", 0x1000: "1000", 0x1fff: "1000", 0x2000: "2000", 0x2fff: "2000", 0x3000: "", 0x4fff: "", 0x5000: "5000", 0x5fff: "5000", 0x6000: ""} {
		got := ""
		if r, ok := regionAt(regions, at); ok {
			got = fmt.Sprint(r.Start)
		}
		if got != want {
			t.Errorf("%s: %q, want %q", at, got, want)
		}
	}
}
