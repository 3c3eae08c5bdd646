package sim

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"hotpatchd/patcher/target"
)

// site is code that must always be one of several byte strings.
type site struct {
	at   target.Addr
	want [][]byte
}

// Site says that while threads run, the bytes at at are always one of want
// (old, new): anything else is a torn site. Forked children inherit it.
func (m *Machine) Site(pid int, at target.Addr, want ...[]byte) error {
	return m.with(pid, "watch a site of", func(p *process) error {
		s := site{at: at}
		for _, w := range want {
			s.want = append(s.want, bytes.Clone(w))
		}
		p.sites = append(p.sites, s)
		return nil
	})
}

// Stopped tells whether threads of the process are held.
func (m *Machine) Stopped(pid int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.procs[pid]
	return p != nil && p.frozen != nil
}

// Violations are the rules broken in this life so far, at most maxViolations.
func (m *Machine) Violations(pid int) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if p := m.procs[pid]; p != nil {
		return slices.Clone(p.wrong)
	}
	return nil
}

// Invariant tells what is wrong with a process whatever fault struck it: a
// thread held, a page both writable and executable, a thread that stands in no
// code, a torn site, code of which memory and instruction cache differ, an
// export of a module that leads nowhere, a violation. Nil for a process that
// is over: it cannot be harmed any more.
func (m *Machine) Invariant(pid int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.procs[pid]
	if p == nil {
		return nil
	}
	var errs []error
	wrong := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("process %d: %w", pid, fmt.Errorf(format, args...)))
	}
	if p.frozen != nil {
		wrong("its threads are held")
	}
	for _, x := range p.mem.maps {
		if x.Prot&target.Write != 0 && x.Prot&target.Exec != 0 {
			wrong("%s is %s", x.Start, x.Prot)
		}
	}
	for _, t := range p.threads {
		if x := p.mem.at(t.pc); x == nil || x.Prot&target.Exec == 0 {
			wrong("%s stands at %s, which is no code", t.name(), t.pc)
		}
	}
	for _, s := range p.sites {
		p.checkSite(s, wrong)
	}
	if at, stale := p.mem.stale(); stale {
		wrong("the instruction cache is stale at %s", at)
	}
	for name, mod := range p.modules {
		for _, e := range mod.img.exports {
			at := mod.base + target.Addr(e.RVA)
			if x := p.mem.at(at); e.Forward != "" || x == nil || x.Prot&target.Exec == 0 {
				continue // data
			}
			if _, err := p.executes(at); err != nil {
				wrong("export %s!%s leads nowhere: %w", name, e.Name, err)
			}
		}
	}
	for _, v := range p.wrong {
		wrong("%s", v)
	}
	return errors.Join(errs...)
}

func (p *process) checkSite(s site, wrong func(string, ...any)) {
	x := p.mem.at(s.at)
	if x == nil {
		return // the module is gone
	}
	for _, w := range s.want {
		b := make([]byte, len(w))
		p.mem.read(b, s.at, false)
		if bytes.Equal(b, w) {
			return
		}
	}
	b := make([]byte, 16)
	p.mem.read(b, s.at, false)
	wrong("site %s is torn: % x", s.at, b)
}

// reachable remembers a violation if threads stand in, or return to, memory
// that is about to be freed.
func (p *process) reachable(sp target.Span) {
	f := frozen{p: p}
	for _, t := range p.threads {
		if sp.Contains(t.pc) {
			p.violate("%s stands at %s, in memory that is freed", t.name(), t.pc)
		}
		for _, st := range f.stacks(t) {
			f.eachWord(st, func(at, w target.Addr) {
				if x := p.mem.at(w); sp.Contains(w) && x != nil && x.Prot&target.Exec != 0 {
					p.violate("%s returns to %s, in memory that is freed", t.name(), w)
				}
			})
		}
	}
	for name, mod := range p.modules {
		for _, e := range mod.img.exports {
			if to, err := p.executes(mod.base + target.Addr(e.RVA)); e.Forward == "" && err == nil && sp.Contains(to) {
				p.violate("export %s!%s runs at %s, in memory that is freed", name, e.Name, to)
			}
		}
	}
}
