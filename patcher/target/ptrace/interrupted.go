//go:build linux && amd64

package ptrace

import (
	"encoding/binary"
	"slices"

	"hotpatchd/patcher/target"
)

// Layout of struct rt_sigframe (arch/x86/include/asm/sigframe.h): the return
// address, then struct ucontext with flags, link, stack_t (24 bytes), the
// general registers in the order of sigcontext, and the signal mask.
const (
	contextGregs = 8 + 8 + 24
	gregRSP      = 15
	gregCount    = 23
)

// Interrupted finds signal frames in stack bytes: a word that is the address
// of a return-from-signal, followed by the context to return to.
func (z *frozen) Interrupted(b []byte, at target.Addr) []target.Addr {
	return interrupted(z.sigret, b, at)
}

func interrupted(sigret []target.Addr, b []byte, at target.Addr) []target.Addr {
	if len(sigret) == 0 {
		return nil
	}
	const rsp = 8 + contextGregs + 8*gregRSP
	var sps []target.Addr
	for o := int(-uint64(at) & 7); o+rsp+8 <= len(b); o += 8 {
		if slices.Contains(sigret, target.Addr(binary.LittleEndian.Uint64(b[o:]))) {
			sps = append(sps, target.Addr(binary.LittleEndian.Uint64(b[o+rsp:])))
		}
	}
	return sps
}
