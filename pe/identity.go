package pe

import (
	"crypto/sha256"
	"encoding/hex"
)

// Identity reads what tells this build of the image from every other. Overlays
// are the canonical bytes of sites of ours, taken instead of memory's when the
// executable sections are hashed; that streams through a buffer of 64 KiB.
func (im *Image) Identity(overlays ...Overlay) (Identity, error) {
	over, err := sortOverlays(overlays)
	if err != nil {
		return Identity{}, err
	}
	id := Identity{
		Machine:       im.Machine,
		SizeOfImage:   im.SizeOfImage,
		TimeDateStamp: im.TimeDateStamp,
		CheckSum:      im.CheckSum,
		ImageBase:     im.preferred,
	}
	rsds, err := im.RSDS()
	if err != nil {
		return Identity{}, err
	}
	if rsds != nil {
		id.RSDS = rsds.String()
	}
	h := sha256.New()
	buf := make([]byte, hashChunk)
	for _, s := range im.Sections {
		if !s.Exec() {
			continue
		}
		for at, end := s.RVA, s.RVA+s.Extent(); at < end; {
			p := buf[:min(end-at, hashChunk)]
			if err := im.canonical(p, at, over); err != nil {
				return Identity{}, err
			}
			h.Write(p)
			at += uint32(len(p))
		}
	}
	id.TextSHA256 = hex.EncodeToString(h.Sum(nil))
	return id, nil
}
