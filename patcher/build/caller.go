package build

import (
	"encoding/binary"
	"fmt"
	"slices"

	"golang.org/x/arch/x86/x86asm"

	"hotpatchd/pe"
)

// maxAfterCall bounds the instructions followed behind one call.
const maxAfterCall = 4000

// checkCallers refuses a fix whose new function may change a register that
// code of the base expects to survive the call. By the calling convention no
// volatile register survives one; but a compiler that sees both caller and
// callee knows better: GCC at -O2 (-fipa-ra) keeps values in registers that
// the old function leaves alone. Only what certainly is read counts: a
// register that the old function never sets is read behind the call before
// anything sets it. What cannot be followed (calls through pointers, vector
// code the decoder does not know) is not reported: the compiler would know no
// more. Callers that are replaced, too, are a warning: a call of the old one
// may be under way. x64 only.
func checkCallers(base, fix *file, functions []Function, dead []pe.Span) ([]string, error) {
	if base.Machine != machineAMD64 {
		return nil, nil
	}
	old, err := newTracer(base, nil)
	if err != nil {
		return nil, err
	}
	now, err := newTracer(fix, dead)
	if err != nil {
		return nil, err
	}
	c := callers{t: old, functions: functions, sites: old.callSites()}
	for _, f := range functions {
		before := old.clobbers(f.Place)
		if danger := now.clobbers(f.Target).writes &^ before.writes; before.returns && danger != 0 {
			if err := c.check(f, danger); err != nil {
				return nil, err
			}
		}
	}
	return c.warnings, nil
}

type callers struct {
	t         *tracer
	functions []Function
	sites     map[uint32][]site // by target
	warnings  []string
}

// site is a place that leads to a function.
type site struct {
	at   uint32
	call bool // else a jump
}

// callSites finds what may lead to any function, by its bytes. A call with the
// very distance to a function's entry is a call; short jumps are believed only
// when the function around them was followed.
func (t *tracer) callSites() map[uint32][]site {
	sites := map[uint32][]site{}
	for _, s := range t.code {
		for i := 0; i+6 <= len(s.b); i++ {
			n, distance := uint32(5), binary.LittleEndian.Uint32(s.b[i+1:])
			switch b := s.b[i]; {
			case b == 0xe8 || b == 0xe9:
			case b == 0xeb || b&0xf0 == 0x70:
				n, distance = 2, uint32(int8(s.b[i+1]))
			case b == 0x0f && s.b[i+1]&0xf0 == 0x80:
				n, distance = 6, binary.LittleEndian.Uint32(s.b[i+2:])
			default:
				continue
			}
			at := s.begin + uint32(i)
			to := at + n + distance
			if _, ok := slices.BinarySearch(t.f.bounds, to); ok {
				sites[to] = append(sites[to], site{at, s.b[i] == 0xe8})
			}
		}
	}
	return sites
}

// check looks at every caller of f, and at the callers of functions that end
// in it or call it and set none of the registers either: a compiler that knows
// what f leaves alone knows it of them, too.
func (c *callers) check(f Function, danger regs) error {
	type reached struct {
		entry  uint32
		danger regs
	}
	seen := map[uint32]regs{}
	for todo := []reached{{f.Place, danger}}; len(todo) > 0; {
		r := todo[0]
		todo = todo[1:]
		if r.danger &^= seen[r.entry]; r.danger == 0 {
			continue
		}
		seen[r.entry] |= r.danger
		for _, s := range c.sites[r.entry] {
			home := c.t.home(s.at)
			if s.call {
				if err := c.checkSite(f, r.entry, s.at, home, r.danger); err != nil {
					return err
				}
			}
			if c.replaced(home) != "" || home == r.entry {
				continue
			}
			around := c.t.clobbers(home)
			if around.returns && slices.Contains(around.to, r.entry) {
				todo = append(todo, reached{home, r.danger &^ (around.writes | around.kept)})
			}
		}
	}
	return nil
}

func (c *callers) checkSite(f Function, entry, at, home uint32, danger regs) error {
	lost, read := c.t.readAfter(at, home, danger)
	if lost == 0 {
		return nil
	}
	caller := c.t.f.nameAt(home)
	if name := c.replaced(at); name != "" {
		c.warnings = append(c.warnings, fmt.Sprintf("the old %s expects its call at %x to leave %s alone, and the new %s may not: a call of %s under way during the swap could go on with a wrong value. Give the new %s __attribute__((no_caller_saved_registers)), compiled with -mgeneral-regs-only, or ask for consistency quiescent",
			name, at, lost.name(), f.NewName, name, f.NewName))
		return nil
	}
	via := ""
	if entry != f.Place {
		via = " through " + c.t.f.nameAt(entry)
	}
	return refuse(CodeCaller, c.t.f.role, f.Name, at,
		"%s calls it%s, expects %s to be left alone and reads it at %x; the old function leaves it alone, the new one may not. GCC makes such callers unless the base is built with -fno-ipa-ra. For this base, give the new function __attribute__((no_caller_saved_registers)), compiled with -mgeneral-regs-only, or replace the caller too (--function %s)",
		caller, via, lost.name(), read, caller)
}

// replaced is the name of the replaced function that rva is part of, or "".
func (c *callers) replaced(rva uint32) string {
	for _, f := range c.functions {
		if rva >= f.Place && rva < f.Place+f.Extra.Length {
			return f.Name
		}
		for _, r := range f.Extra.Ranges {
			if rva >= r.RVA && rva < r.RVA+r.Length {
				return f.Name
			}
		}
	}
	return ""
}

// home is the entry of the function that rva is part of.
func (t *tracer) home(rva uint32) uint32 {
	if u, ok := t.f.spanAt(rva); ok {
		return u.Primary
	}
	i, found := slices.BinarySearch(t.f.bounds, rva)
	if !found {
		i--
	}
	if i < 0 {
		return 0
	}
	return t.f.bounds[i]
}

// onward is a place behind a call and the registers that still hold what they
// held before. below: in another function, which the caller calls or ends in.
type onward struct {
	at    uint32
	want  regs
	below bool
}

// readAfter follows the code behind the call at site and finds the first
// register of want that is read before it is set, and where.
func (t *tracer) readAfter(site, home uint32, want regs) (lost regs, at uint32) {
	in, ok := t.at(site)
	if !ok || in.Op != x86asm.CALL {
		return 0, 0
	}
	todo := []onward{{site + uint32(in.Len), want, false}}
	if u, ok := t.f.spanAt(site); ok && todo[0].at >= u.End {
		return 0, 0 // nothing follows: it does not come back
	}
	type place struct {
		at    uint32
		below bool
	}
	seen := map[place]regs{}
	for steps := 0; len(todo) > 0 && steps < maxAfterCall; steps++ {
		p := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		here := place{p.at, p.below}
		if p.want &^= seen[here]; p.want == 0 {
			continue
		}
		seen[here] |= p.want
		in, ok := t.at(p.at)
		if !ok {
			continue
		}
		next := p.at + uint32(in.Len)
		to, direct := target(in, next)
		reads, writes, ok := t.does.effect(in)
		switch {
		case traps(in):
			continue
		case in.Op == x86asm.RET:
			for _, out := range []regs{regRAX, regXMM0} {
				if !p.below && p.want&out != 0 && t.pending(site, home, out) {
					return out, p.at
				}
			}
			continue
		case in.Op == x86asm.JMP || in.Op == x86asm.CALL:
			reads, writes, ok = argument(in, 0)|addresses(in), 0, true
		case !ok:
			continue
		}
		if hit := reads & p.want; hit != 0 && !(p.below && spills(in)) {
			return hit & -hit, p.at
		}
		p.want &^= writes | reads
		switch {
		case in.Op == x86asm.CALL && direct:
			callee := t.clobbers(to)
			todo = append(todo, onward{to, p.want & regsArguments, true})
			if callee.returns {
				todo = append(todo, onward{next, p.want &^ callee.writes, p.below})
			}
		case in.Op == x86asm.CALL: // nothing survives it
		case in.Op == x86asm.JMP && direct:
			o := onward{to, p.want, p.below}
			if !p.below && t.home(to) != home {
				o = onward{to, p.want & regsArguments, true}
			}
			todo = append(todo, o)
		case in.Op == x86asm.JMP:
		default:
			if direct {
				todo = append(todo, onward{to, p.want, p.below})
			}
			todo = append(todo, onward{next, p.want, p.below})
		}
	}
	return 0, 0
}

// spills tells a store into the stack. At the entry of a function it may be
// of a parameter that was never passed: one with variable arguments saves all
// four registers.
func spills(in x86asm.Inst) bool {
	m, ok := in.Args[0].(x86asm.Mem)
	return ok && (m.Base == x86asm.RSP || m.Base == x86asm.RBP)
}

// pending tells whether the straight code before a call sets a result register
// and does not read it: set for nothing, unless it is to be returned.
func (t *tracer) pending(site, home uint32, result regs) bool {
	if u, ok := t.f.spanAt(site); ok {
		home = u.Begin // of this part
	}
	set := false
	for at := home; at < site; {
		in, ok := t.at(at)
		if !ok {
			return false
		}
		at += uint32(in.Len)
		reads, writes, ok := t.does.effect(in)
		_, branch := in.Args[0].(x86asm.Rel)
		switch {
		case !ok || branch || reads&result != 0:
			set = false
		case writes&result != 0:
			set = true
		}
	}
	return set
}
