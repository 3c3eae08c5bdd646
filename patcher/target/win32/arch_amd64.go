//go:build windows

package win32

import (
	"bytes"
	"encoding/binary"

	"hotpatchd/patcher/target"
)

const (
	nativeArch    = target.AMD64
	nativeMachine = machineAMD64
)

// CONTEXT of amd64 (winnt.h): where its parts lie, in bytes. The integer
// registers follow one another in the order of the encoding.
const (
	contextSize     = 1232
	contextFlagsAt  = 0x30
	contextRegsAt   = 0x78
	contextRegs     = 16
	contextSPAt     = 0x98
	contextPCAt     = 0xf8
	contextWanted   = 0x100000 | 1 | 2 // CONTEXT_CONTROL and CONTEXT_INTEGER
	serviceCodeSize = 32
)

// serviceNumber finds the number of the system service whose stub the bytes
// before the program counter belong to: mov r10,rcx; mov eax,number; …; the
// instruction that enters the kernel.
func serviceNumber(before []byte) (uint32, bool) {
	i := bytes.LastIndex(before, []byte{0x4c, 0x8b, 0xd1, 0xb8})
	if i < 0 || len(before)-i < 8+2 {
		return 0, false
	}
	body := before[i+8:]
	for _, enter := range [][]byte{{0x0f, 0x05}, {0xcd, 0x2e}, {0xff, 0x14, 0x25}, {0xff, 0x15}} { // syscall, int 2e, two calls through a pointer
		at := len(body) - len(enter)
		if enter[0] == 0xff {
			at = len(body) - len(enter) - 4
		}
		if at >= 0 && bytes.HasPrefix(body[at:], enter) {
			return binary.LittleEndian.Uint32(before[i+4:]), true
		}
	}
	return 0, false
}

// serviceOf reads the number out of the start of a stub.
func serviceOf(stub []byte) (uint32, bool) {
	if len(stub) < 8 || !bytes.HasPrefix(stub, []byte{0x4c, 0x8b, 0xd1, 0xb8}) {
		return 0, false
	}
	return binary.LittleEndian.Uint32(stub[4:]), true
}

// callStub takes the address of four words (rcx): a function and its three
// arguments. It leaves the return address where it found it, so that the
// function returns into the start of the thread.
var callStub = []byte{
	0x48, 0x8b, 0x01, // mov rax,[rcx]
	0x48, 0x8b, 0x51, 0x10, // mov rdx,[rcx+16]
	0x4c, 0x8b, 0x41, 0x18, // mov r8,[rcx+24]
	0x48, 0x8b, 0x49, 0x08, // mov rcx,[rcx+8]
	0xff, 0xe0, // jmp rax
}
