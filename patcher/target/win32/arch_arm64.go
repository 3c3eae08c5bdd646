//go:build windows

package win32

import (
	"encoding/binary"

	"hotpatchd/patcher/target"
)

const (
	nativeArch    = target.ARM64
	nativeMachine = machineARM64
)

// ARM64_NT_CONTEXT (winnt.h): where its parts lie, in bytes. x0 to x30 follow
// one another.
const (
	contextSize     = 912
	contextFlagsAt  = 0
	contextRegsAt   = 8
	contextRegs     = 31
	contextSPAt     = 0x100
	contextPCAt     = 0x108
	contextWanted   = 0x400000 | 1 | 2 // CONTEXT_CONTROL and CONTEXT_INTEGER
	serviceCodeSize = 4
)

// serviceNumber reads the number out of the svc instruction before the program counter.
func serviceNumber(before []byte) (uint32, bool) {
	if len(before) < 4 {
		return 0, false
	}
	return serviceOf(before[len(before)-4:])
}

// serviceOf reads the number out of the start of a stub: svc #number.
func serviceOf(stub []byte) (uint32, bool) {
	if len(stub) < 4 {
		return 0, false
	}
	w := binary.LittleEndian.Uint32(stub)
	return w >> 5 & 0xffff, w&0xffe0001f == 0xd4000001
}

// callStub takes the address of four words (x0): a function and its three
// arguments. It leaves the link register as it found it, so that the function
// returns into the start of the thread.
var callStub = []byte{
	0x08, 0x00, 0x40, 0xf9, // ldr x8,[x0]
	0x01, 0x08, 0x40, 0xf9, // ldr x1,[x0,#16]
	0x02, 0x0c, 0x40, 0xf9, // ldr x2,[x0,#24]
	0x00, 0x04, 0x40, 0xf9, // ldr x0,[x0,#8]
	0x00, 0x01, 0x1f, 0xd6, // br x8
}
