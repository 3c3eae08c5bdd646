//go:build linux && amd64

package ptrace

import (
	"bytes"
	"sort"
	"strings"
	"sync"

	"hotpatchd/patcher/target"
)

// Pieces of code that every program has somewhere.
var (
	// mov $15,%rax; syscall: what a signal handler returns into. libc, musl and
	// the Go runtime use just these bytes, by which debuggers know the frame.
	sigreturnCode = []byte{0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05}
	// syscall; ret
	syscallCode = []byte{0x0f, 0x05, 0xc3}
	// syscall; cmp $-4095,%rax; jae +1; ret: glibc's wrappers. After an error
	// it would go on to set errno, which only happens if we die meanwhile.
	wrapperCode = []byte{0x0f, 0x05, 0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, 0x73, 0x01, 0xc3}
)

const (
	// scanLimit bounds what is read of one process in search of code, and
	// anonymousLimit of one mapping that no file backs: what a compiler inside
	// the program makes holds no return from signals.
	scanLimit      = 512 << 20
	anonymousLimit = 32 << 20
	// chunk is read at a time; pieces overlap by more than the longest pattern.
	scanChunk   = 1 << 20
	scanOverlap = 16
	// cacheLimit bounds the files whose offsets are remembered.
	cacheLimit = 4096
)

// found are offsets from the start of one executable mapping.
type found struct {
	sigreturn []uint64
	syscall   []uint64 // a few; the best first
}

// mapping identifies what an executable private mapping of a file holds. The
// bytes are checked again before they are used.
type mapping struct {
	path         string
	inode        uint64
	offset, size uint64
}

// gadgetCache remembers by file what was found in it: libc is searched once,
// not once a process. Safe for concurrent use.
type gadgetCache struct {
	mu    sync.Mutex
	files map[mapping]found
}

func newGadgetCache() *gadgetCache { return &gadgetCache{files: map[mapping]found{}} }

// trampolines is what one life is known to have, by the executable mappings it had.
type trampolines struct {
	regions   []target.Region // executable ones, at the last search
	known     map[target.Region]found
	sigreturn []target.Addr
	syscall   []target.Addr
}

// find searches the executable mappings that are new since the last time and
// returns where signal handlers return to.
func (t *trampolines) find(p *process, regions []target.Region) []target.Addr {
	var now []target.Region
	for _, r := range regions {
		if r.Prot&target.Exec != 0 && r.Prot&target.Read != 0 && !r.Shared && r.Start < 1<<47 {
			now = append(now, r)
		}
	}
	if sameRegions(t.regions, now) {
		return t.sigreturn
	}
	// Native libraries first: code of a PE image may be changed by others.
	sort.SliceStable(now, func(i, j int) bool { return rank(&now[i]) < rank(&now[j]) })
	t.sigreturn, t.syscall = nil, nil
	known := make(map[target.Region]found, len(now))
	left := uint64(scanLimit)
	for i := range now {
		r := &now[i]
		f, ok := t.known[*r]
		if !ok {
			if r.Size() > left || r.Kind == target.Private && r.Size() > anonymousLimit {
				continue
			}
			var cached bool
			if f, cached = p.b.gadgets.get(p, r); !cached {
				left -= r.Size()
			}
		}
		known[*r] = f
		for _, o := range f.sigreturn {
			t.sigreturn = append(t.sigreturn, r.Start+target.Addr(o))
		}
		for _, o := range f.syscall {
			t.syscall = append(t.syscall, r.Start+target.Addr(o))
		}
	}
	t.known = known
	sort.Slice(now, func(i, j int) bool { return now[i].Start < now[j].Start })
	t.regions = now
	return t.sigreturn
}

func sameRegions(a, b []target.Region) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}

func rank(r *target.Region) int {
	switch {
	case strings.Contains(r.Path, "/libc.so") || strings.Contains(r.Path, "/libc-") || strings.Contains(r.Path, "/ld-"):
		return 0
	case strings.Contains(r.Path, ".so"):
		return 1
	case r.Kind == target.File && !strings.HasSuffix(strings.ToLower(r.Path), ".dll"):
		return 2
	case r.Kind == target.Special:
		return 3
	default:
		return 4
	}
}

func (c *gadgetCache) get(p *process, r *target.Region) (f found, cached bool) {
	key := mapping{r.Path, r.Inode, r.Offset, r.Size()}
	if r.Kind == target.File && r.Inode != 0 {
		c.mu.Lock()
		f, ok := c.files[key]
		c.mu.Unlock()
		if ok && holds(p, r.Start, f.sigreturn, sigreturnCode) {
			return f, true
		}
	}
	f, complete := scan(p, r)
	if complete && r.Kind == target.File && r.Inode != 0 {
		c.mu.Lock()
		if len(c.files) >= cacheLimit {
			c.files = map[mapping]found{}
		}
		c.files[key] = f
		c.mu.Unlock()
	}
	return f, false
}

// holds tells whether the code is there: two file systems may have one inode
// number under one path each, as containers have.
func holds(p *process, start target.Addr, offsets []uint64, code []byte) bool {
	b := make([]byte, len(code))
	for _, o := range offsets {
		if _, err := p.ReadAt(b, start+target.Addr(o)); err != nil || !bytes.Equal(b, code) {
			return false
		}
	}
	return true
}

// scan reads one mapping and finds every return from signals and a few calls.
// It is not complete if the process ended meanwhile: that must not be remembered.
func scan(p *process, r *target.Region) (f found, complete bool) {
	complete = true
	var wrappers []uint64
	buf := make([]byte, min(r.Size(), scanChunk+scanOverlap))
	for at := uint64(0); at < r.Size(); at += scanChunk {
		b := buf[:min(r.Size()-at, uint64(len(buf)))]
		n, err := p.ReadAt(b, r.Start+target.Addr(at))
		complete = complete && err == nil
		b = b[:n]
		each(b, sigreturnCode, scanChunk, func(o int) { f.sigreturn = append(f.sigreturn, at+uint64(o)) })
		if len(f.syscall) < 4 {
			each(b, syscallCode, scanChunk, func(o int) { f.syscall = append(f.syscall, at+uint64(o)) })
		}
		if len(wrappers) < 4 {
			each(b, wrapperCode, scanChunk, func(o int) { wrappers = append(wrappers, at+uint64(o)) })
		}
	}
	f.syscall = append(f.syscall[:min(len(f.syscall), 4)], wrappers[:min(len(wrappers), 4)]...)
	return f, complete
}

// each reports where pattern begins in the first limit bytes of b.
func each(b, pattern []byte, limit int, report func(int)) {
	for from := 0; ; {
		i := bytes.Index(b[from:], pattern)
		if i < 0 || from+i >= limit {
			return
		}
		report(from + i)
		from += i + 1
	}
}

// regionAt finds the region that holds an address, nil if there is none.
func regionAt(regions []target.Region, at target.Addr) *target.Region {
	i := sort.Search(len(regions), func(i int) bool { return regions[i].End > at })
	if i == len(regions) || regions[i].Start > at {
		return nil
	}
	return &regions[i]
}
