package build

import (
	"bytes"
	"errors"

	"golang.org/x/arch/x86/x86asm"
)

// endbr64 is not known to the decoder.
var endbr64 = []byte{0xf3, 0x0f, 0x1e, 0xfa}

var errInstruction = errors.New("unknown or cut instruction")

// decode reads one x86-64 instruction. A bare prefix comes back from the
// decoder as an instruction without an operation; that is an error here.
func decode(b []byte) (x86asm.Inst, error) {
	if bytes.HasPrefix(b, endbr64) {
		return x86asm.Inst{Op: x86asm.NOP, Len: len(endbr64)}, nil
	}
	in, err := x86asm.Decode(b, 64)
	if err != nil || in.Op == 0 || in.Len == 0 {
		return in, errInstruction
	}
	return in, nil
}

// endsFlow tells instructions after which nothing runs on.
func endsFlow(in x86asm.Inst) bool {
	switch in.Op {
	case x86asm.RET, x86asm.LRET, x86asm.IRET, x86asm.IRETD, x86asm.IRETQ, x86asm.JMP, x86asm.LJMP, x86asm.UD1, x86asm.UD2:
		return true
	case x86asm.INT:
		return in.Args[0] == x86asm.Imm(3)
	}
	return false
}

// filler tells instructions that compilers put between functions: INT3, any
// NOP (also XCHG AX,AX), and the ADD [RAX],AL that two zero bytes are.
func filler(b []byte, in x86asm.Inst) bool {
	switch in.Op {
	case x86asm.NOP:
		return true
	case x86asm.INT:
		return in.Args[0] == x86asm.Imm(3)
	case x86asm.XCHG:
		return in.Args[0] == in.Args[1]
	}
	return in.Len >= 2 && b[0] == 0 && b[1] == 0
}
