package control

import (
	"crypto/sha256"
	"encoding/binary"
)

// SIDNumber turns a Windows security identifier ("S-1-5-21-…") into the number
// that stands for its owner where Linux has a uid: the first 52 bits of its
// SHA-256, so that JSON readers keep it exact, and never 0 or below. 0 is
// whoever may do everything (see Caller). Who tells the owners of processes
// must use the same number, or ordinary users do not see their own.
func SIDNumber(sid string) int {
	sum := sha256.Sum256([]byte(sid))
	if n := int(binary.BigEndian.Uint64(sum[:]) >> 12); n != 0 {
		return n
	}
	return 1
}
