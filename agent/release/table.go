package release

import (
	"bytes"
	"errors"
	"fmt"

	"hotpatchd/pe"
)

// table is what the hot patch table of an image says that the manifest says, too.
type table struct {
	arch     string
	sequence uint32
	stamp    uint32 // of the base
}

func readTable(content []byte) (table, error) {
	image, err := pe.Parse(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return table{}, err
	}
	arch := ArchOf(image.Machine)
	if arch == "" {
		return table{}, fmt.Errorf("machine %#x: images for amd64 and arm64 can be patched", image.Machine)
	}
	info, err := image.HotPatch()
	if err != nil {
		return table{}, err
	}
	if info == nil || len(info.Bases) != 1 {
		return table{}, errors.New("it has no hot patch table with one base: hotpatch-build image makes hotpatch images")
	}
	return table{arch, info.SequenceNumber, info.Bases[0].OriginalTimeDateStamp}, nil
}

// agrees tells whether the manifest says the same: a side file of another
// build would make a release that fits nowhere.
func (t table) agrees(i *Image, source string) error {
	if i.Arch != t.arch {
		return fmt.Errorf("arch is %q, but %s is for %s", clip(i.Arch), source, t.arch)
	}
	if i.Base.TimeDateStamp != t.stamp {
		return fmt.Errorf("base has the time stamp %d, but the table of %s is for a base with %d", i.Base.TimeDateStamp, source, t.stamp)
	}
	return nil
}

// CheckTables compares the hot patch table of every image with the manifest:
// devices refuse an image whose table says another sequence, machine or base.
// Open does not look, for a device goes on with the other images; for an
// author or publisher one is too many.
func (r *Release) CheckTables() error {
	for n := range r.Images {
		i := &r.Images[n]
		t, err := readTable(r.ImageBytes(n))
		if err == nil {
			err = t.agrees(i, i.File)
		}
		if err == nil && t.sequence != r.Sequence {
			err = fmt.Errorf("the release has sequence %d, but the hotpatch image, %s in it, was made with sequence %d: set sequence = %d, or make the image anew by hotpatch-build image --sequence %d",
				r.Sequence, i.File, t.sequence, t.sequence, r.Sequence)
		}
		if err != nil {
			return fmt.Errorf("release %s: image %d for %s: %w", r.ID, n+1, i.Name, err)
		}
	}
	return nil
}
