#include "textflag.h"

// func call(fn, argument, stack uintptr) uintptr
//
// Calls fn in the Microsoft x64 convention on a stack of its own: RCX holds the
// argument, 32 bytes of home space lie below the 16-byte aligned top, RBX
// survives the call. On the goroutine's own stack the callee's frames would
// lie in the Go heap, which a patcher that looks for return addresses would
// have to search to its end. Preemption signals that arrive inside are
// harmless: they run on the signal stack, and the runtime finds no Go function
// at that pc, or one written in assembly here, and lets it go on.
TEXT ·call(SB), NOSPLIT, $0-32
	MOVQ fn+0(FP), AX
	MOVQ argument+8(FP), CX
	MOVQ stack+16(FP), DX
	MOVQ SP, BX
	MOVQ DX, SP
	SUBQ $32, SP
	CALL AX
	MOVQ BX, SP
	MOVQ AX, ret+24(FP)
	RET
