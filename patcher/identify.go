package patcher

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// identify decides whether an image in a process is the base a patch was made
// for, and whether every function to be replaced has the bytes it should.
// Our own writes (found) are undone first. Names play no part.
func identify(base Loaded, patch *Patch, found []annex) (originals, error) {
	im := base.Image
	code := originals{im: im, preferred: im.ImageBase, overlays: overlays(found)}
	if patch.Base.ImageBase != 0 {
		code.preferred = patch.Base.ImageBase
	}
	im.SetPreferredBase(code.preferred) // another patch may have set another one
	if err := sameBuild(im, patch.Base); err != nil {
		return code, err
	}
	foreign, drift, err := compareBodies(base, patch, code)
	if err != nil {
		return code, err
	}
	if mandatoryText(patch.Base) {
		id, err := im.Identity(append(apart(code.overlays, foreign), foreign...)...)
		if err != nil {
			return code, fmt.Errorf("cannot hash the code of %s: %w", base.Name, err)
		}
		if id.TextSHA256 != patch.Base.TextSHA256 {
			return code, otherBuild("%s is another build: its code has hash %.12s…, the release names %.12s…", base.Name, id.TextSHA256, patch.Base.TextSHA256)
		}
	}
	return code, drift
}

// mandatoryText: where the linker left no stamp or no RSDS record, only the
// code itself tells builds apart.
func mandatoryText(id pe.Identity) bool {
	return id.TimeDateStamp == 0 || id.RSDS == ""
}

// sameBuild compares what the headers say. The checksum is not compared:
// signing changes it.
func sameBuild(im *pe.Image, want pe.Identity) error {
	rsds := ""
	if r, err := im.RSDS(); err != nil {
		return fmt.Errorf("cannot read debug directory: %w", err)
	} else if r != nil {
		rsds = r.String()
	}
	switch {
	case im.Machine != want.Machine:
		return otherBuild("machine is %#x, the release names %#x", im.Machine, want.Machine)
	case im.SizeOfImage != want.SizeOfImage:
		return otherBuild("size of image is %d, the release names %d", im.SizeOfImage, want.SizeOfImage)
	case im.TimeDateStamp != want.TimeDateStamp:
		return otherBuild("time stamp is %#x, the release names %#x", im.TimeDateStamp, want.TimeDateStamp)
	case rsds != want.RSDS:
		return otherBuild("RSDS is %q, the release names %q", rsds, want.RSDS)
	}
	return nil
}

// compareBodies hashes every function and every further range. A function that
// differs in its first bytes alone, and is right with the recorded ones put
// there, was hooked by somebody else: that is drift, and its recorded bytes are
// returned so that the rest of the code can still be identified.
func compareBodies(base Loaded, patch *Patch, code originals) (foreign []pe.Overlay, drift error, err error) {
	for _, f := range patch.Functions {
		if uint64(f.RVA)+uint64(f.Length) > uint64(base.Size) || f.Length == 0 {
			return nil, nil, otherBuild("%s at %x lies outside the image", f.Name, f.RVA)
		}
		body := make([]byte, f.Length)
		if err := code.canonical(body, f.RVA); err != nil {
			return nil, nil, err
		}
		if sha256.Sum256(body) != f.SHA256 {
			at := base.Base + target.Addr(f.RVA)
			n := min(len(body), len(f.Original))
			have := bytes.Clone(body[:n])
			copy(body, f.Original[:n])
			if sha256.Sum256(body) == f.SHA256 {
				foreign = append(foreign, pe.Overlay{RVA: f.RVA, Bytes: f.Original[:n]})
			}
			if drift == nil {
				d := drifted(at, f.Original[:n], have, f.Name)
				if looksHooked(have) {
					d.Code, d.Text = "hooked", f.Name+" was changed at its entry by somebody else"
				}
				drift = d
			}
		}
		for _, r := range f.Ranges {
			if uint64(r.RVA)+uint64(r.Length) > uint64(base.Size) {
				return nil, nil, otherBuild("a further part of %s at %x lies outside the image", f.Name, r.RVA)
			}
			b := make([]byte, r.Length)
			if err := code.canonical(b, r.RVA); err != nil {
				return nil, nil, err
			}
			if sha256.Sum256(b) != r.SHA256 && drift == nil {
				drift = drifted(base.Base+target.Addr(r.RVA), nil, head(b), "a further part of "+f.Name)
			}
		}
	}
	return foreign, drift, nil
}

// apart leaves out the overlays that touch any of others.
func apart(list, others []pe.Overlay) []pe.Overlay {
	return slices.DeleteFunc(slices.Clone(list), func(o pe.Overlay) bool {
		return slices.ContainsFunc(others, func(x pe.Overlay) bool {
			return o.RVA < x.RVA+uint32(len(x.Bytes)) && x.RVA < o.RVA+uint32(len(o.Bytes))
		})
	})
}

// looksHooked: the bytes begin with a jump, as entry hooks do.
func looksHooked(b []byte) bool {
	return b[0] == 0xe9 || b[0] == 0xeb || b[0] == 0xcc || (len(b) > 1 && b[0] == 0xff && b[1] == 0x25) ||
		(len(b) > 1 && b[0] == 0x48 && b[1] == 0xb8)
}

func hexOf(b [32]byte) string { return hex.EncodeToString(b[:]) }
