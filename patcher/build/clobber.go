package build

import (
	"slices"

	"golang.org/x/arch/x86/x86asm"

	"hotpatchd/pe"
)

// Bounds of following code. What exceeds one is taken for unknown: a base can
// be hostile, and no function worth asking about comes near.
const (
	maxTraced = 20_000 // instructions of one function
	maxDepth  = 32     // calls below one another
)

// tracer follows the code of one image.
type tracer struct {
	f     *file
	code  []codeSection
	avoid []pe.Span // code that does not run as it stands
	known map[uint32]clobbers
	does  behaviours
}

type codeSection struct {
	begin uint32
	b     []byte
}

// clobbers is what calling a function does to the caller's registers.
type clobbers struct {
	writes  regs     // may be changed; all where the code cannot be followed
	kept    regs     // saved at the entry and restored before each return
	returns bool     // some path comes back
	to      []uint32 // functions it calls or ends in, directly
}

var clobbersAll = clobbers{writes: regsVolatile, returns: true}

func newTracer(f *file, avoid []pe.Span) (*tracer, error) {
	t := &tracer{f: f, avoid: avoid, known: map[uint32]clobbers{}, does: behaviours{}}
	for _, s := range f.Sections {
		if !s.Exec() {
			continue
		}
		b := make([]byte, s.Extent())
		if err := f.Canonical(b, s.RVA); err != nil {
			return nil, damaged(f.role, err)
		}
		t.code = append(t.code, codeSection{s.RVA, b})
	}
	return t, nil
}

// at decodes the instruction at rva.
func (t *tracer) at(rva uint32) (x86asm.Inst, bool) {
	if slices.ContainsFunc(t.avoid, func(s pe.Span) bool { return rva >= s.Begin && rva < s.End }) {
		return x86asm.Inst{}, false
	}
	for _, s := range t.code {
		if rva >= s.begin && rva-s.begin < uint32(len(s.b)) {
			in, err := decode(s.b[rva-s.begin:])
			return in, err == nil
		}
	}
	return x86asm.Inst{}, false
}

// target is where a relative branch leads.
func target(in x86asm.Inst, next uint32) (uint32, bool) {
	rel, ok := in.Args[0].(x86asm.Rel)
	return next + uint32(rel), ok
}

// traps tells instructions nothing runs on from, other than jumps and returns.
func traps(in x86asm.Inst) bool {
	imm, _ := in.Args[0].(x86asm.Imm)
	return in.Op == x86asm.UD1 || in.Op == x86asm.UD2 || in.Op == x86asm.INT && (imm == 3 || imm == 0x29)
}

// clobbers follows a function and all it calls directly.
func (t *tracer) clobbers(entry uint32) clobbers { return t.follow(entry, nil) }

func (t *tracer) follow(entry uint32, above []uint32) clobbers {
	if c, ok := t.known[entry]; ok {
		return c
	}
	if len(above) >= maxDepth || slices.Contains(above, entry) {
		return clobbersAll
	}
	c := t.body(entry, append(slices.Clone(above), entry))
	t.known[entry] = c
	return c
}

// trail is a place still to be followed, and the general registers that were
// popped immediately before it.
type trail struct {
	at   uint32
	pops string
}

func (t *tracer) body(entry uint32, above []uint32) clobbers {
	var c clobbers
	saved := t.saved(entry)
	restored := true // on every return so far
	todo, seen := []trail{{entry, ""}}, map[trail]bool{}
	for len(todo) > 0 {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[p] {
			continue
		}
		if seen[p] = true; len(seen) > maxTraced {
			return clobbersAll
		}
		in, ok := t.at(p.at)
		if !ok {
			return clobbersAll
		}
		next := p.at + uint32(in.Len)
		to, direct := target(in, next)
		switch {
		case traps(in):
		case in.Op == x86asm.RET:
			c.returns = true
			restored = restored && p.pops == saved
		case in.Op == x86asm.CALL && direct && to == entry: // of itself: does nothing else
			todo = append(todo, trail{next, ""})
		case in.Op == x86asm.CALL && direct:
			callee := t.follow(to, above)
			c.writes |= callee.writes
			c.to = append(c.to, to)
			if callee.returns {
				todo = append(todo, trail{next, ""})
			}
		case in.Op == x86asm.CALL:
			c.writes = regsVolatile
			todo = append(todo, trail{next, ""})
		case in.Op == x86asm.JMP && direct:
			c.to = append(c.to, to)
			todo = append(todo, trail{to, ""})
		case in.Op == x86asm.JMP:
			cases, ok := t.table(entry, in)
			if !ok {
				return clobbersAll
			}
			todo = append(todo, cases...)
		case in.Op == x86asm.POP:
			if r, ok := in.Args[0].(x86asm.Reg); ok && number(r) >= 0 {
				p.pops += string(rune('a' + number(r)))
				c.writes |= regsOf(r)
			}
			todo = append(todo, trail{next, p.pops})
		default:
			_, writes, ok := t.does.effect(in)
			if !ok {
				return clobbersAll
			}
			c.writes |= writes
			todo = append(todo, trail{next, ""})
			if direct { // a conditional jump
				c.to = append(c.to, to)
				todo = append(todo, trail{to, ""})
			}
		}
	}
	if restored {
		for _, n := range saved {
			c.kept |= 1 << (n - 'a') & regsVolatile
		}
	}
	c.writes &^= c.kept
	return c
}

// saved are the general registers a function pushes first of all, in the
// order in which they have to be popped.
func (t *tracer) saved(entry uint32) string {
	order := ""
	for at := entry; ; {
		in, ok := t.at(at)
		if !ok || len(order) > 16 {
			return order
		}
		at += uint32(in.Len)
		r, isReg := in.Args[0].(x86asm.Reg)
		switch {
		case in.Op == x86asm.NOP:
		case in.Op == x86asm.PUSH && isReg && number(r) >= 0:
			order = string(rune('a'+number(r))) + order
		default:
			return order
		}
	}
}

// table is where a jump through a table may lead: to any instruction of the
// function. A jump to elsewhere, through one slot, is not ok.
func (t *tracer) table(entry uint32, in x86asm.Inst) ([]trail, bool) {
	if m, ok := in.Args[0].(x86asm.Mem); ok && m.Index == 0 {
		return nil, false
	}
	end := t.f.after(entry)
	if u, ok := t.f.spanAt(entry); ok {
		end = u.End
	}
	var list []trail
	for at := entry; at < end && len(list) < maxTraced; {
		in, ok := t.at(at)
		if !ok {
			return nil, false
		}
		if in.Op != x86asm.NOP {
			list = append(list, trail{at, ""})
		}
		at += uint32(in.Len)
	}
	return list, true
}
