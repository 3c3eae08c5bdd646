package agent

import (
	"bytes"

	"hotpatchd/agent/control"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// shape is what a verified hotpatch image tells of the annexes that hold it:
// protections and lengths, which records do not repeat.
type shape struct {
	functions map[uint32]uint32 // RVA in the base → new function, RVA in the hotpatch image
	segments  []pe.Segment
	spans     []pe.UnwindSpan
}

// shapeOf reads the shape of a hotpatch image; what cannot be read is not shown.
func shapeOf(p *patcher.Patch, file []byte) shape {
	s := shape{functions: map[uint32]uint32{}}
	for _, f := range p.Functions {
		s.functions[f.RVA] = f.Target
	}
	im, err := pe.Parse(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		return s
	}
	if placed, err := im.Place(im.ImageBase); err == nil {
		s.segments = placed.Segments
	}
	s.spans, _ = im.UnwindSpans()
	return s
}

// prot is the protection of a part of an annex that begins at rva, counted from
// where the hotpatch image lies in it.
func (s shape) prot(rva target.Addr) target.Prot {
	for _, g := range s.segments {
		if rva < target.Addr(g.Begin) || rva >= target.Addr(g.End) {
			continue
		}
		switch {
		case g.Exec:
			return target.Read | target.Exec
		case g.Write:
			return target.Read | target.Write
		}
		return target.Read
	}
	return target.Read | target.Exec // the jump slots behind the image
}

// size is the length of the function that begins at rva, 0 if that is not known.
func (s shape) size(rva uint32) uint64 {
	for _, x := range s.spans {
		if x.Begin == rva {
			return uint64(x.End - x.Begin)
		}
	}
	return 0
}

// showAnnex shows an annex part by part. Its first page is our header, r--. l
// is its release, nil if that is not loaded: then what is not recorded is not known.
func showAnnex(r patcher.Record, l *loaded) *control.Annex {
	x := &control.Annex{Address: control.Addr(r.Annex), Size: uint64(r.AnnexEnd - r.Annex), Segments: []control.Segment{}, Functions: []control.AnnexFunction{}}
	var s shape
	known := false
	if l != nil {
		s, known = l.shapes[r.Hash]
	}
	var image target.Addr // where the hotpatch image lies
	for _, site := range r.Sites {
		if rva, ok := s.functions[site.RVA]; ok && site.Target != 0 {
			image = site.Target - target.Addr(rva)
		}
	}
	for _, p := range r.Parts {
		g := control.Segment{Address: control.Addr(p.Start), Size: uint64(p.End - p.Start)}
		switch {
		case p.Start == r.Annex:
			g.Prot = target.Read.String()
		case known && image != 0 && p.Start >= image:
			g.Prot = s.prot(p.Start - image).String()
		}
		x.Segments = append(x.Segments, g)
	}
	for _, site := range r.Sites {
		if site.Target != 0 {
			x.Functions = append(x.Functions, control.AnnexFunction{Name: site.Function, Address: control.Addr(site.Target), Size: s.size(s.functions[site.RVA])})
		}
	}
	return x
}
