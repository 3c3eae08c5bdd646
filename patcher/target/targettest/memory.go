package targettest

import (
	"bytes"
	"errors"

	"hotpatchd/patcher/target"
)

var memoryCases = []testCase{
	{"read and write at page borders", readWrite},
	{"reads and writes end where memory ends", partial},
	{"write to code", writeCode},
	{"regions are sorted and cover the code", regionsSorted},
	{"alloc gives exactly what was asked", allocExact},
	{"alloc refuses", allocRefuses},
	{"protect", protect},
	{"free", free},
	{"scratch of the victim's own", scratch},
}

// alloc allocates in a gap near the victim's code and frees at the end.
func (e *env) alloc(v Victim, p target.Process, size uint64, prot target.Prot) target.Addr {
	e.Helper()
	code, _ := v.Code()
	at := e.gap(p, code, size)
	if err := p.Alloc(at, size, prot); err != nil {
		e.Fatalf("Alloc of %d bytes %s at %s, which was free: %v", size, prot, at, err)
	}
	return at
}

// pattern is n bytes that repeat nowhere within a page.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ byte(i>>8)*31 ^ seed
	}
	return b
}

func readWrite(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at := e.alloc(v, p, 4*pageSize, target.Read|target.Write)
	for i, c := range []struct{ off, n int }{
		{0, 1}, {1, 7}, {pageSize - 1, 2}, {pageSize - 3, 8}, {2*pageSize - 1, 1}, {pageSize, pageSize},
		{pageSize / 2, 2 * pageSize}, {0, 4 * pageSize}, {4*pageSize - 1, 1}, {4*pageSize - 5, 5},
	} {
		whole := pattern(4*pageSize, byte(i))
		if n, err := p.WriteAt(whole, at); n != len(whole) || err != nil {
			e.Fatalf("WriteAt of all: %d, %v", n, err)
		}
		b := pattern(c.n, byte(i)^0xff)
		if n, err := p.WriteAt(b, at+target.Addr(c.off)); n != c.n || err != nil {
			e.Fatalf("WriteAt of %d at +%#x: %d, %v", c.n, c.off, n, err)
		}
		copy(whole[c.off:], b)
		got := make([]byte, c.n)
		if n, err := p.ReadAt(got, at+target.Addr(c.off)); n != c.n || err != nil || !bytes.Equal(got, b) {
			e.Errorf("ReadAt of %d at +%#x: %d, %v, equal %v", c.n, c.off, n, err, bytes.Equal(got, b))
		}
		all := make([]byte, len(whole))
		if _, err := p.ReadAt(all, at); err != nil || !bytes.Equal(all, whole) {
			e.Errorf("after WriteAt of %d at +%#x the bytes around it are not as before (%v)", c.n, c.off, err)
		}
	}
	if n, err := p.ReadAt(nil, at); n != 0 || err != nil {
		e.Errorf("ReadAt of nothing: %d, %v", n, err)
	}
	if n, err := p.WriteAt(nil, at); n != 0 || err != nil {
		e.Errorf("WriteAt of nothing: %d, %v", n, err)
	}
}

func partial(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at := e.alloc(v, p, 2*pageSize, target.Read|target.Write)
	end := at + 2*pageSize
	for _, in := range []int{0, 1, 5, pageSize, pageSize + 1} {
		b := pattern(in+16, 7)
		from := end - target.Addr(in)
		n, err := p.WriteAt(b, from)
		if n != in || err == nil {
			e.Errorf("WriteAt of %d with %d mapped: %d, %v", len(b), in, n, err)
		}
		got := make([]byte, len(b))
		n, err = p.ReadAt(got, from)
		if n != in || err == nil {
			e.Errorf("ReadAt of %d with %d mapped: %d, %v", len(b), in, n, err)
		}
		if !bytes.Equal(got[:in], b[:in]) {
			e.Errorf("the %d bytes that were written read differently", in)
		}
		for _, kind := range []error{target.ErrGone, target.ErrDenied} {
			if errors.Is(err, kind) {
				e.Errorf("reading what is not mapped is taken for %v", kind)
			}
		}
	}
	for _, bad := range []target.Addr{0, 16, 0xffff_ffff_ffff_fff0, 0x8000_0000_0000_0000} {
		if n, err := p.ReadAt(make([]byte, 32), bad); n != 0 || err == nil {
			e.Errorf("ReadAt at %s: %d, %v", bad, n, err)
		}
		if n, err := p.WriteAt(make([]byte, 32), bad); n != 0 || err == nil {
			e.Errorf("WriteAt at %s: %d, %v", bad, n, err)
		}
	}
	e.runs(v)
}

func writeCode(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at, n := v.Code()
	b, c := make([]byte, n), make([]byte, n)
	if _, err := p.ReadAt(b, at); err != nil {
		e.Fatal(err)
	}
	r, _ := region(e.regions(p), at)
	if r.Prot&target.Exec == 0 || r.Prot&target.Write != 0 {
		e.Fatalf("the victim's code is %s", r.Prot)
	}
	f := e.freeze(p)
	// The same bytes: what matters is that they may be written at all.
	if got, err := p.WriteAt(b, at); got != n || err != nil {
		e.Errorf("WriteAt to code: %d, %v", got, err)
	}
	e.must("Flush", p.Flush(at, n))
	e.thaw(f)
	if _, err := p.ReadAt(c, at); err != nil || !bytes.Equal(b, c) {
		e.Errorf("code reads differently (%v)", err)
	}
	if q, _ := region(e.regions(p), at); q.Prot != r.Prot {
		e.Errorf("the protection is %s after a write, was %s", q.Prot, r.Prot)
	}
	e.runs(v)
}

func regionsSorted(e *env) {
	v := e.start(Want{Threads: 3})
	p := e.open(v)
	at, n := v.Code()
	last := target.Region{}
	covered := false
	for _, r := range e.regions(p) {
		if r.Start >= r.End || r.Start%pageSize != 0 || r.End%pageSize != 0 {
			e.Errorf("region %s-%s is no run of pages", r.Start, r.End)
		}
		if r.Start < last.End {
			e.Errorf("region %s-%s overlaps or comes before %s-%s", r.Start, r.End, last.Start, last.End)
		}
		covered = covered || at >= r.Start && at+target.Addr(n) <= r.End && r.Prot&target.Exec != 0
		last = r
	}
	if !covered {
		e.Errorf("no executable region covers the code at %s", at)
	}
}

func allocExact(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	for _, prot := range []target.Prot{target.Read, target.Read | target.Write, target.Read | target.Exec} {
		for _, size := range []uint64{pageSize, 16 * pageSize} {
			at := e.alloc(v, p, size, prot)
			list := e.regions(p)
			for a := at; a < at+target.Addr(size); a += pageSize {
				r, ok := region(list, a)
				if !ok || r.Prot != prot || r.Shared || r.Path != "" {
					e.Fatalf("page %s of %d bytes %s: region %+v", a, size, prot, r)
				}
			}
			got := make([]byte, size)
			if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, make([]byte, size)) {
				e.Errorf("new memory is not zero or not readable (%v)", err)
			}
			// Filled whatever its protection: this is how an annex comes about.
			b := pattern(int(size), 3)
			if n, err := p.WriteAt(b, at); n != len(b) || err != nil {
				e.Errorf("WriteAt to new memory %s: %d, %v", prot, n, err)
			}
			if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, b) {
				e.Errorf("new memory %s does not keep what was written (%v)", prot, err)
			}
			if before, ok := region(list, at-1); ok {
				e.Errorf("something was mapped before: %+v", before)
			}
			if after, ok := region(list, at+target.Addr(size)); ok {
				e.Errorf("something was mapped behind: %+v", after)
			}
			e.must("Free", p.Free(at, size))
		}
	}
	e.runs(v)
}

func allocRefuses(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	code, _ := v.Code()
	codePage := code &^ (pageSize - 1)
	e.wantErr("Alloc over the code", p.Alloc(codePage, pageSize, target.Read), target.ErrTaken)
	at := e.alloc(v, p, 2*pageSize, target.Read|target.Write)
	if _, err := p.WriteAt([]byte{1, 2, 3}, at); err != nil {
		e.Fatal(err)
	}
	rw := target.Read | target.Write
	e.wantErr("Alloc over our own", p.Alloc(at, 2*pageSize, rw), target.ErrTaken)
	e.wantErr("Alloc that begins in our own", p.Alloc(at+pageSize, 2*pageSize, rw), target.ErrTaken)
	e.wantErr("Alloc that ends in our own", p.Alloc(at-pageSize, 2*pageSize, rw), target.ErrTaken)
	var b [3]byte
	if _, err := p.ReadAt(b[:], at); err != nil || b != [3]byte{1, 2, 3} {
		e.Errorf("a refused Alloc changed what was there: % x, %v", b, err)
	}
	if _, ok := region(e.regions(p), at-pageSize); ok {
		e.Error("a refused Alloc mapped its first part")
	}
	free := at + 4*pageSize
	refused := func(what string, err error) {
		e.Helper()
		if err == nil {
			e.Errorf("%s is not refused", what)
		}
		if _, ok := region(e.regions(p), free); ok {
			e.Errorf("%s mapped something", what)
		}
	}
	refused("a misaligned address", p.Alloc(free+1, pageSize, rw))
	refused("a misaligned size", p.Alloc(free, pageSize+1, rw))
	refused("a size of zero", p.Alloc(free, 0, rw))
	refused("write and execute", p.Alloc(free, pageSize, rw|target.Exec))
	refused("the first page of all", p.Alloc(0, pageSize, rw))
	refused("an address of the system", p.Alloc(0xffff_8000_0000_0000, pageSize, rw))
	refused("a size that wraps around", p.Alloc(free, ^uint64(0)&^(pageSize-1), rw))
	e.must("Free", p.Free(at, 2*pageSize))
	e.runs(v)
}

func protect(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at := e.alloc(v, p, 3*pageSize, target.Read|target.Write)
	b := pattern(3*pageSize, 1)
	if _, err := p.WriteAt(b, at); err != nil {
		e.Fatal(err)
	}
	e.must("Protect", p.Protect(at+pageSize, pageSize, target.Read))
	e.must("Protect", p.Protect(at+2*pageSize, pageSize, target.Read|target.Write))
	list := e.regions(p)
	for i, want := range []target.Prot{target.Read | target.Write, target.Read, target.Read | target.Write} {
		if r, _ := region(list, at+target.Addr(i)*pageSize); r.Prot != want {
			e.Errorf("page %d is %s, want %s", i, r.Prot, want)
		}
	}
	got := make([]byte, len(b))
	if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, b) {
		e.Errorf("the contents changed (%v)", err)
	}
	if err := p.Protect(at, pageSize, target.Read|target.Write|target.Exec); err == nil {
		e.Error("write and execute together are not refused")
	}
	if r, _ := region(e.regions(p), at); r.Prot != target.Read|target.Write {
		e.Errorf("after the refusal page 0 is %s", r.Prot)
	}
	if err := p.Protect(at+8*pageSize, pageSize, target.Read); err == nil {
		e.Error("Protect of what is not mapped is not refused")
	}
	if err := p.Protect(at+1, pageSize, target.Read); err == nil {
		e.Error("Protect at a misaligned address is not refused")
	}
	e.must("Free", p.Free(at, 3*pageSize))
	e.runs(v)
}

func free(e *env) {
	v := e.start(Want{})
	p := e.open(v)
	at := e.alloc(v, p, 4*pageSize, target.Read|target.Write)
	e.must("Free of a part", p.Free(at+pageSize, pageSize))
	if _, ok := region(e.regions(p), at+pageSize); ok {
		e.Error("what was freed is still mapped")
	}
	if _, err := p.ReadAt(make([]byte, 1), at+pageSize); err == nil {
		e.Error("what was freed is readable")
	}
	for _, a := range []target.Addr{at, at + 2*pageSize} {
		if _, ok := region(e.regions(p), a); !ok {
			e.Errorf("%s was freed too", a)
		}
	}
	e.must("Alloc where it was freed", p.Alloc(at+pageSize, pageSize, target.Read))
	e.must("Free", p.Free(at, 4*pageSize))
	if err := p.Free(at+1, pageSize); err == nil {
		e.Error("Free at a misaligned address is not refused")
	}
	e.runs(v)
}

func scratch(e *env) {
	v := e.start(Want{Threads: 2})
	at := able[Writable](e, v).Scratch()
	p := e.open(v)
	b := pattern(64, 9)
	if n, err := p.WriteAt(b, at); n != 64 || err != nil {
		e.Fatalf("WriteAt to the victim's own memory: %d, %v", n, err)
	}
	got := make([]byte, 64)
	if _, err := p.ReadAt(got, at); err != nil || !bytes.Equal(got, b) {
		e.Errorf("it does not keep what was written (%v)", err)
	}
	e.runs(v)
}
