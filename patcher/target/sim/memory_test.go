package sim

import (
	"bytes"
	"testing"

	"pgregory.net/rapid"

	"hotpatchd/patcher/target"
)

// TestMemoryAgainstModel holds an address space and its clones against plain
// maps of bytes.
func TestMemoryAgainstModel(t *testing.T) {
	const pages = 12
	const base target.Addr = 0x100000
	type model struct {
		mem          memory
		prot         map[int]target.Prot // of mapped pages
		bytes, cache [pages * pageSize]byte
	}
	rapid.Check(t, func(t *rapid.T) {
		spaces := []*model{{prot: map[int]target.Prot{}}}
		span := func() (from, n int, sp target.Span) {
			from = rapid.IntRange(0, pages-1).Draw(t, "page")
			n = rapid.IntRange(1, pages-from).Draw(t, "pages")
			return from, n, target.Span{Start: base + target.Addr(from*pageSize), End: base + target.Addr((from+n)*pageSize)}
		}
		prots := []target.Prot{target.Read, target.Read | target.Write, target.Read | target.Exec}
		pick := func() *model { return spaces[rapid.IntRange(0, len(spaces)-1).Draw(t, "space")] }
		mapped := func(m *model, from, n int) int {
			for i := range n {
				if _, ok := m.prot[from+i]; !ok {
					return i
				}
			}
			return n
		}
		run := func() (m *model, off, n, reach int) {
			m = pick()
			off = rapid.IntRange(0, pages*pageSize-1).Draw(t, "offset")
			n = rapid.IntRange(0, min(3*pageSize, pages*pageSize-off)).Draw(t, "bytes")
			for reach < n {
				if _, ok := m.prot[(off+reach)/pageSize]; !ok {
					break
				}
				reach = min(n, ((off+reach)/pageSize+1)*pageSize-off)
			}
			return m, off, n, reach
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				m := pick()
				from, n, sp := span()
				prot := rapid.SampledFrom(prots).Draw(t, "prot")
				free := true
				for i := range n {
					if _, ok := m.prot[from+i]; ok {
						free = false
					}
				}
				err := m.mem.add(mapping{Region: target.Region{Start: sp.Start, End: sp.End, Prot: prot}})
				if free != (err == nil) {
					t.Fatalf("add %v: %v, free %v", sp, err, free)
				}
				if !free {
					return
				}
				for i := range n {
					m.prot[from+i] = prot
				}
				clear(m.bytes[from*pageSize : (from+n)*pageSize])
				clear(m.cache[from*pageSize : (from+n)*pageSize])
			},
			"remove": func(t *rapid.T) {
				m := pick()
				from, n, sp := span()
				m.mem.remove(sp)
				for i := range n {
					delete(m.prot, from+i)
				}
			},
			"protect": func(t *rapid.T) {
				m := pick()
				from, n, sp := span()
				list := m.mem.covered(sp)
				if whole := mapped(m, from, n) == n; whole != (list != nil) {
					t.Fatalf("covered %v: %d mappings, whole %v", sp, len(list), whole)
				}
				prot := rapid.SampledFrom(prots).Draw(t, "prot")
				for _, x := range list {
					x.Prot = prot
				}
				if list != nil {
					for i := range n {
						m.prot[from+i] = prot
					}
				}
			},
			"write": func(t *rapid.T) {
				m, off, n, reach := run()
				if got := m.mem.reach(base+target.Addr(off), n, true); got != reach {
					t.Fatalf("reach of %d at %#x: %d, want %d", n, off, got, reach)
				}
				b := rapid.SliceOfN(rapid.Byte(), 1, 8).Draw(t, "fill")
				p := bytes.Repeat(b, reach/len(b)+1)[:reach]
				m.mem.write(p, base+target.Addr(off))
				copy(m.bytes[off:], p)
			},
			"flush": func(t *rapid.T) {
				m, off, _, reach := run()
				m.mem.flush(base+target.Addr(off), reach)
				copy(m.cache[off:off+reach], m.bytes[off:])
			},
			"clone": func(t *rapid.T) {
				if len(spaces) == 3 {
					return
				}
				m := pick()
				c := *m
				c.mem, c.prot = m.mem.clone(), map[int]target.Prot{}
				for k, v := range m.prot {
					c.prot[k] = v
				}
				spaces = append(spaces, &c)
			},
			"": func(t *rapid.T) {
				for k, m := range spaces {
					last := target.Addr(0)
					for _, x := range m.mem.maps {
						if x.Start < last || x.Start >= x.End {
							t.Fatalf("space %d: mappings overlap or are out of order at %s", k, x.Start)
						}
						last = x.End
					}
					for i := range pages {
						at := base + target.Addr(i*pageSize)
						prot, ok := m.prot[i]
						x := m.mem.at(at)
						if ok != (x != nil) || ok && x.Prot != prot {
							t.Fatalf("space %d, page %d: mapped %v %s, have %+v", k, i, ok, prot, x)
						}
						if !ok {
							continue
						}
						var b [pageSize]byte
						m.mem.read(b[:], at, false)
						if !bytes.Equal(b[:], m.bytes[i*pageSize:(i+1)*pageSize]) {
							t.Fatalf("space %d, page %d: memory differs", k, i)
						}
						m.mem.read(b[:], at, true)
						if !bytes.Equal(b[:], m.cache[i*pageSize:(i+1)*pageSize]) {
							t.Fatalf("space %d, page %d: instruction cache differs", k, i)
						}
					}
				}
			},
		})
	})
}
