package patcher

import (
	"errors"
	"testing"

	"hotpatchd/patcher/target"
)

// An entry that the operating system's own hotpatch engine redirected (a short
// backward jump into the filler, the long jump there) is somebody else's: we
// neither build on it nor undo it.
func TestSystemHotpatchIsDrift(t *testing.T) {
	for back := byte(0xee); back != 0; back++ { // eb ee to eb ff
		w := newWorld(t)
		at := w.base.Base + target.Addr(victims[1].rva) // g, with filler before it
		w.poke(at-8, []byte{0xff, 0x25, 0, 0, 0, 0, 0xcc, 0xcc, 0xeb, back})
		_, err := Prepare(w.p, w.base, w.patch(1, "g"))
		var r *Refusal
		if !errors.As(err, &r) || r.Reason != Drifted || r.At != at {
			t.Errorf("eb %x: %v", back, err)
		}
	}
}
