package patcher

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// Loaded is one PE image found in a process.
type Loaded struct {
	Base  target.Addr
	Size  uint32 // SizeOfImage, bytes
	Name  string // from the export directory, else the file's base name; "" if neither is known
	Path  string // backing file, "" if the headers are not mapped from one
	Image *pe.Image
}

// End is the first address after the image.
func (l Loaded) End() target.Addr { return l.Base + target.Addr(l.Size) }

// Is tells whether the image goes by this name, whatever the case and whether
// the name comes from the export directory or from the file. A name is a
// label: it selects candidates, never a match.
func (l Loaded) Is(name string) bool {
	if strings.EqualFold(l.Name, name) {
		return true
	}
	return l.Path != "" && strings.EqualFold(baseName(l.Path), name)
}

// memory reads one image of a process by offset from its base.
type memory struct {
	p    target.Process
	base target.Addr
}

func (m memory) ReadAt(b []byte, off int64) (int, error) {
	return m.p.ReadAt(b, m.base+target.Addr(off))
}

// maxImages bounds the images of one process: real ones have a few hundred.
const maxImages = 4096

// ErrTooManyImages: the process has mapped more images than are looked at.
var ErrTooManyImages = fmt.Errorf("more than %d images", maxImages)

// Images finds the PE images of a process; see [Survey.Images].
func Images(p target.Process) ([]Loaded, error) { return Look(context.Background(), p).Images() }

// walk parses the images that begin in some regions.
func (s *Survey) walk(regions []target.Region) ([]Loaded, error) {
	var found []Loaded
	for _, r := range regions {
		if !mayStartImage(r) || len(found) > 0 && within(r, found[len(found)-1]) {
			continue
		}
		if err := s.ctx.Err(); err != nil {
			return nil, err
		}
		l, err := imageAt(s.p, r, regions)
		if err != nil {
			if errors.Is(err, target.ErrGone) || errors.Is(err, target.ErrDenied) {
				return nil, err
			}
			continue
		}
		if len(found) == maxImages {
			return nil, fmt.Errorf("cannot list images of process %d: %w", s.p.Info().PID, ErrTooManyImages)
		}
		found = append(found, l)
	}
	return found, nil
}

// maxImageName bounds an image's name, bytes: longer than any file's.
const maxImageName = 255

// within tells further regions of an image already found from another file
// that lies where the image, which may lie, claims to be.
func within(r target.Region, l Loaded) bool {
	return r.Start < l.End() && !(r.Kind == target.File && r.Offset == 0 && r.Path != l.Path)
}

// mayStartImage: headers are mapped from the start of a file, or anonymous.
func mayStartImage(r target.Region) bool {
	if r.Prot&target.Read == 0 || r.Size() < target.PageSize {
		return false
	}
	return (r.Kind == target.File && r.Offset == 0) || r.Kind == target.Private
}

var errNoImage = errors.New("no image here")

func imageAt(p target.Process, r target.Region, regions []target.Region) (Loaded, error) {
	var mz [2]byte
	if _, err := p.ReadAt(mz[:], r.Start); err != nil {
		return Loaded{}, err
	}
	if mz != [2]byte{'M', 'Z'} {
		return Loaded{}, errNoImage
	}
	im, err := pe.ParseMapped(memory{p, r.Start}, uint64(r.Start))
	if err != nil {
		return Loaded{}, err
	}
	if !hasCode(im, r.Start, regions) {
		return Loaded{}, errNoImage
	}
	l := Loaded{Base: r.Start, Size: im.SizeOfImage, Path: r.Path, Image: im}
	if name, err := im.ExportName(); err == nil && name != "" && len(name) <= maxImageName {
		l.Name = name
	} else if r.Path != "" {
		l.Name = baseName(r.Path)
	}
	return l, nil
}

// hasCode tells an image that can run from one without code (resources, Wine's
// apisetschema.dll) and from a file that is mapped to be read: there nothing
// executable lies where its sections of code should.
func hasCode(im *pe.Image, base target.Addr, regions []target.Region) bool {
	for _, s := range im.Sections {
		if !s.Exec() {
			continue
		}
		if r, ok := regionAt(regions, base+target.Addr(s.RVA)); ok && r.Prot&target.Exec != 0 {
			return true
		}
	}
	return false
}

// baseName takes the last element of a Linux or Windows path.
func baseName(p string) string {
	return path.Base(strings.ReplaceAll(p, `\`, "/"))
}
