package patcher

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"

	"hotpatchd/pe"
)

// Origin says which verified release a hotpatch image comes from.
type Origin struct {
	Product     string
	Release     string // id
	Sequence    uint32
	Image       string // name of the base image in the manifest
	Base        pe.Identity
	Consistency string // "entry" (what this engine reaches), or another word, refused by name
	Unwind      string // "none" or "required"
}

// Patch is a hotpatch image ready to be planned with. Safe for concurrent use.
type Patch struct {
	Origin
	Hash      [32]byte // SHA-256 of the hotpatch image's file
	Functions []Function
	image     *pe.Image
	inverse   []pe.HotPatchRecord
}

// Function is one function to be replaced.
type Function struct {
	Name   string // label for people: the new function's export name, else "sub_" and the RVA
	RVA    uint32 // entry in the base
	Target uint32 // new function, RVA in the hotpatch image
	pe.FunctionExtra
}

// maxFunctions bounds one hotpatch image; the format allows 4095 a chunk.
const maxFunctions = 4095

// maxName cuts function names, bytes: they are labels, and annex headers are sized by it.
const maxName = 128

// NewPatch reads a hotpatch image that was verified as part of a release.
// Errors are the author's: a table that is not of our making, or one that
// contradicts the release.
func NewPatch(o Origin, file []byte) (*Patch, error) {
	im, err := pe.Parse(bytes.NewReader(file), int64(len(file)))
	if err != nil {
		return nil, fmt.Errorf("cannot read hotpatch image for %s: %w", o.Image, err)
	}
	if im.Machine != o.Base.Machine {
		return nil, fmt.Errorf("hotpatch image for %s is for machine %#x, its base for %#x", o.Image, im.Machine, o.Base.Machine)
	}
	info, err := im.HotPatch()
	if err != nil {
		return nil, fmt.Errorf("cannot read hotpatch image for %s: %w", o.Image, err)
	}
	if info == nil {
		return nil, fmt.Errorf("hotpatch image for %s has no hot patch table", o.Image)
	}
	if info.ExtraPatchSize != pe.FunctionExtraWords || len(info.Bases) != 1 {
		return nil, fmt.Errorf("hotpatch image for %s: table has %d extra words and %d bases, wanted %d and 1 (was it made by hotpatch-build?)",
			o.Image, info.ExtraPatchSize, len(info.Bases), pe.FunctionExtraWords)
	}
	if info.SequenceNumber != o.Sequence {
		return nil, fmt.Errorf("hotpatch image for %s has sequence %d, its release %d", o.Image, info.SequenceNumber, o.Sequence)
	}
	base := info.Bases[0]
	if base.OriginalTimeDateStamp != o.Base.TimeDateStamp {
		return nil, fmt.Errorf("hotpatch image for %s was made for a base of time stamp %#x, its release names %#x", o.Image, base.OriginalTimeDateStamp, o.Base.TimeDateStamp)
	}
	x := &Patch{Origin: o, Hash: sha256.Sum256(file), image: im}
	names, err := exportNames(im)
	if err != nil {
		return nil, fmt.Errorf("cannot read hotpatch image for %s: %w", o.Image, err)
	}
	for _, r := range base.Records {
		if r.Inverse {
			x.inverse = append(x.inverse, r)
			continue
		}
		if r.Type != pe.HotPatchFunction {
			return nil, fmt.Errorf("hotpatch image for %s: record at %#x of the table changes the base other than at an entry", o.Image, r.Offset)
		}
		extra, err := info.Function(r)
		if err != nil {
			return nil, fmt.Errorf("cannot read hotpatch image for %s: %w", o.Image, err)
		}
		name := names[r.Target]
		if name == "" {
			name = fmt.Sprintf("sub_%x", r.Place)
		}
		name = strings.ToValidUTF8(name[:min(len(name), maxName)], "?")
		x.Functions = append(x.Functions, Function{Name: name, RVA: r.Place, Target: r.Target, FunctionExtra: extra})
	}
	if len(x.Functions) == 0 || len(x.Functions) > maxFunctions {
		return nil, fmt.Errorf("hotpatch image for %s replaces %d functions, wanted 1 to %d", o.Image, len(x.Functions), maxFunctions)
	}
	return x, nil
}

func exportNames(im *pe.Image) (map[uint32]string, error) {
	exports, err := im.Exports()
	if err != nil {
		return nil, err
	}
	names := make(map[uint32]string, len(exports))
	for _, e := range exports {
		if e.Name != "" && e.Forward == "" {
			names[e.RVA] = e.Name
		}
	}
	return names, nil
}
