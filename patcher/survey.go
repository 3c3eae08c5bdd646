package patcher

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// Survey is what is read of one opened process for one turn of work on it: its
// regions, the images in them, the headers of annexes, exports and imports.
// Each is read when first asked for, once, and shared by all that is looked up
// and planned in that turn, so that a turn costs what the process is large and
// not its square.
//
// A survey is for finding and planning. The bytes of an image that is to be
// patched are read anew for each plan, and what is written rests on what is
// read under the freeze. It is not safe for concurrent use, and ends with the
// turn: keep none.
type Survey struct {
	ctx context.Context // of the turn: a walk ends with it
	p   target.Process

	regions []target.Region
	stale   bool // the regions: we have mapped memory since

	images  []Loaded
	walked  bool
	names   map[string][]Loaded // by lower-case name, of the export directory and of the file
	exports map[target.Addr][]pe.Export
	dlls    map[target.Addr][]string // imported statically
	sets    *apiSetMap

	annexes []annex // as their headers tell; whether they are in force is looked up anew
	probed  bool
	added   []target.Addr // annexes of ours since
	budget  headerBudget
}

// Look begins a survey. Nothing is read yet. Every walk through the process
// ends with ctx, as an error of it.
func Look(ctx context.Context, p target.Process) *Survey {
	return &Survey{ctx: ctx, p: p, exports: map[target.Addr][]pe.Export{}, dlls: map[target.Addr][]string{},
		budget: headerBudget{bytes: maxHeaders, objects: maxObjects}}
}

// now are the regions, as of the last mapping of ours.
func (s *Survey) now() ([]target.Region, error) {
	if s.regions != nil && !s.stale {
		return s.regions, nil
	}
	regions, err := s.p.Regions()
	if err != nil {
		return nil, err
	}
	s.regions, s.stale = regions, false
	return regions, nil
}

// mapped says that we map an annex at at.
func (s *Survey) mapped(at target.Addr) {
	s.stale = true
	s.added = append(s.added, at)
}

// Images finds the PE images with code in the process by walking its regions
// and parsing headers: one way for all backends. A region whose bytes are not a
// sane image is passed over: foreign memory may hold anything. Errors are those
// of the process and of the turn alone.
func (s *Survey) Images() ([]Loaded, error) {
	if s.walked {
		return s.images, nil
	}
	regions, err := s.now()
	if err != nil {
		return nil, err
	}
	if s.images, err = s.walk(regions); err != nil {
		return nil, err
	}
	s.walked = true
	return s.images, nil
}

// ErrUnloaded: no image lies where one was.
var ErrUnloaded = errors.New("the image was unloaded")

// At is the image that was found at base, its headers read anew; ErrUnloaded if
// there is none any more.
func (s *Survey) At(base target.Addr) (Loaded, error) {
	regions, err := s.now()
	if err != nil {
		return Loaded{}, err
	}
	r, ok := regionAt(regions, base)
	if !ok || r.Start != base || !mayStartImage(r) {
		return Loaded{}, ErrUnloaded
	}
	l, err := imageAt(s.p, r, regions)
	switch {
	case errors.Is(err, target.ErrGone), errors.Is(err, target.ErrDenied):
		return Loaded{}, err
	case err != nil:
		return Loaded{}, ErrUnloaded
	}
	return l, nil
}

// named are the images that go by a name, whatever the case.
func (s *Survey) named(dll string) ([]Loaded, error) {
	if s.names == nil {
		images, err := s.Images()
		if err != nil {
			return nil, err
		}
		s.names = map[string][]Loaded{}
		for _, l := range images {
			name, file := strings.ToLower(l.Name), ""
			if l.Path != "" {
				file = strings.ToLower(baseName(l.Path))
			}
			s.names[name] = append(s.names[name], l)
			if file != "" && file != name {
				s.names[file] = append(s.names[file], l)
			}
		}
	}
	return s.names[strings.ToLower(dll)], nil
}

// What a survey keeps of all modules together. A process of many modules needs
// the exports of a few, and a module imports from some tens of others.
const (
	maxExportsKept = 128 << 10
	maxNamesKept   = 64 << 10
)

func (s *Survey) exportsOf(m Loaded) ([]pe.Export, error) {
	if e, ok := s.exports[m.Base]; ok {
		return e, nil
	}
	e, err := m.Image.Exports()
	if err != nil {
		return nil, fmt.Errorf("cannot read exports of %s: %w", m.Name, err)
	}
	kept := len(e)
	for _, x := range s.exports {
		kept += len(x)
	}
	if kept > maxExportsKept {
		clear(s.exports)
	}
	s.exports[m.Base] = e
	return e, nil
}

// importsOf are the names of the modules that m imports statically. What cannot
// be read names none: it is not part of what can be shown, and refusal follows.
func (s *Survey) importsOf(m Loaded) []string {
	if names, ok := s.dlls[m.Base]; ok {
		return names
	}
	imports, err := m.Image.Imports()
	if err != nil {
		imports = nil
	}
	var names []string
	for _, i := range imports {
		if !i.Delay && len(i.DLL) <= maxImageName && (len(names) == 0 || names[len(names)-1] != i.DLL) {
			names = append(names, strings.Clone(i.DLL))
		}
	}
	kept := len(names)
	for _, x := range s.dlls {
		kept += len(x)
	}
	if kept > maxNamesKept {
		clear(s.dlls)
	}
	s.dlls[m.Base] = names
	return names
}

// apiSets is the process's own map; nil if the backend does not know of one.
func (s *Survey) apiSets() (*apiSetMap, error) {
	if s.sets == nil {
		var err error
		if s.sets, err = readApiSetMap(s.p); err != nil {
			return nil, err
		}
	}
	return s.sets, nil
}

// headers are the annexes of the process, as their headers tell.
func (s *Survey) headers() ([]annex, error) {
	if !s.probed {
		regions, err := s.now()
		if err != nil {
			return nil, err
		}
		s.annexes = nil // of a walk that was broken off
		if err := s.probe(regions); err != nil {
			return nil, err
		}
		s.probed, s.added = true, nil
	}
	for len(s.added) > 0 {
		at := s.added[0]
		s.annexes = slices.DeleteFunc(s.annexes, func(a annex) bool { return a.At == at })
		regions, err := s.now()
		if err != nil {
			return nil, err
		}
		if r, ok := regionAt(regions, at); ok && mayHoldHeader(r) {
			if err := s.take(at, uint64(r.End-at)); err != nil {
				return nil, err
			}
		}
		s.added = s.added[1:]
	}
	return s.annexes, nil
}

// annexesOf lists the annexes that belong to the image at base, and looks which
// are in force. What they say is only a claim until it is checked against a
// verified release.
func (s *Survey) annexesOf(base Loaded) ([]annex, error) {
	all, err := s.headers()
	if err != nil {
		return nil, err
	}
	var found []annex
	for _, a := range all {
		if !near(a.At, base) || a.Base != base.Base || a.Identity.SizeOfImage != base.Size {
			continue
		}
		if err := s.ctx.Err(); err != nil {
			return nil, err
		}
		if err := a.look(s.p); err != nil {
			return nil, err
		}
		found = append(found, a)
	}
	return found, nil
}

// Claims lists the annexes in force in the process, whoever put them there: a
// former life of ours, the parent of a fork, another installation.
func (s *Survey) Claims() ([]Claim, error) {
	all, err := s.headers()
	if err != nil {
		return nil, err
	}
	var claims []Claim
	for _, a := range all {
		if err := s.ctx.Err(); err != nil {
			return nil, err
		}
		if err := a.look(s.p); err != nil {
			return nil, err
		}
		if a.live {
			claims = append(claims, Claim{a.Base, a.Product, a.Release, a.Sequence, a.Hash})
		}
	}
	return claims, nil
}
