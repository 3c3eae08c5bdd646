//go:build linux && amd64

package ptrace

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// redZone is what a function may use below its stack pointer without moving it
// (System V ABI for x86-64, 3.2.2).
const redZone = 128

// Layout of what rt_sigreturn reads (arch/x86/include/uapi/asm/sigcontext.h,
// ucontext.h): return address, ucontext with 40 bytes before the registers,
// 23 registers, pointer to the FPU state, 8 reserved words, the signal mask.
const (
	frameGregs = 8 + contextGregs
	frameFPU   = frameGregs + 8*gregCount
	frameMask  = frameFPU + 8 + 64
	frameSize  = frameMask + 8

	ucFPXState      = 1 // UC_FP_XSTATE: the FPU state is XSAVE's
	ucSigcontextSS  = 2 // UC_SIGCONTEXT_SS
	ucStrictRestore = 4 // UC_STRICT_RESTORE_SS
	// noStackChange is no mode of sigaltstack(2). rt_sigreturn sets the alternate
	// stack from the frame and ignores that it was refused, so the thread keeps its own.
	noStackChange = 0x7f

	fxSoftware  = 464        // struct _fpx_sw_bytes in the FXSAVE area
	fxMagic1    = 0x46505853 // FP_XSTATE_MAGIC1
	fxMagic2    = 0x46505845 // FP_XSTATE_MAGIC2, behind the state
	xsaveHeader = 512        // xstate_bv is its first word
	xsaveLegacy = 576        // legacy area and header
	// xsaveMax is more than any processor's state of today (AMX: 11008 bytes).
	xsaveMax = 32 << 10
	// Tile data (AMX) is enabled thread by thread: a frame with room for it is
	// refused by a thread that never used it.
	tileFeatures = 1<<17 | 1<<18
)

// context is everything a thread needs to be where it was.
type threadContext struct {
	regs   unix.PtraceRegs
	mask   uint64
	xstate []byte // as PTRACE_GETREGSET gives it
	call   uint64 // number of the system call to make again, if one was interrupted
}

// Results by which the kernel tells itself how to go on with a system call that
// a stop interrupted (include/linux/errno.h). They never reach a program.
const (
	restartSys     = -512
	restartNoIntr  = -513
	restartNoHand  = -514
	restartBlock   = -516
	restartSyscall = 219 // the number a call has that was restarted by its restart block
)

func (c *threadContext) interrupted() bool {
	if int64(c.regs.Orig_rax) < 0 {
		return false
	}
	switch int64(c.regs.Rax) {
	case restartSys, restartNoIntr, restartNoHand, restartBlock:
		return true
	}
	return false
}

// frameRoom is how many bytes below the red zone a frame may take.
func (c *threadContext) frameRoom() uint64 {
	return uint64(len(c.xstate)) + frameSize + 4 + 64 + 16
}

// frame lays out a signal frame that ends at or below top. The thread that
// returns into sigreturn with the stack pointer 8 above at is where it was.
func (c *threadContext) frame(top, sigreturn uint64) (b []byte, at uint64) {
	x := c.fpu()
	fpu := (top - uint64(len(x))) &^ 63 // XRSTOR wants 64
	at = (fpu-frameSize)&^15 - 8        // as the kernel aligns it: 16, less the return address
	b = make([]byte, fpu+uint64(len(x))-at)
	copy(b[fpu-at:], x)

	r := c.regs
	if c.interrupted() {
		r.Rax, r.Rip = c.call, r.Rip-2
	}
	put := func(o int, v uint64) { binary.LittleEndian.PutUint64(b[o:], v) }
	put(0, sigreturn)
	put(8, ucFPXState|ucSigcontextSS|ucStrictRestore)
	put(8+16+8, noStackChange)
	segments := r.Cs&0xffff | r.Ss&0xffff<<48
	for i, v := range [gregCount]uint64{r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15,
		r.Rdi, r.Rsi, r.Rbp, r.Rbx, r.Rdx, r.Rax, r.Rcx, r.Rsp, r.Rip, r.Eflags, segments} {
		put(frameGregs+8*i, v)
	}
	put(frameFPU, fpu)
	put(frameMask, c.mask)
	return b, at
}

// fpu is the XSAVE area as a signal frame holds it: software bytes that tell
// what is in it, and an end mark.
func (c *threadContext) fpu() []byte {
	le := binary.LittleEndian
	size := len(c.xstate)
	features := le.Uint64(c.xstate[fxSoftware:]) // the regset has XCR0 here
	if features&tileFeatures != 0 && le.Uint64(c.xstate[xsaveHeader:])&tileFeatures == 0 {
		features &^= tileFeatures
		size = min(size, xsaveSize(features))
	}
	x := make([]byte, size+4)
	copy(x, c.xstate[:size])
	software := x[fxSoftware : fxSoftware+48]
	clear(software)
	le.PutUint32(software, fxMagic1)
	le.PutUint32(software[4:], uint32(size+4))
	le.PutUint64(software[8:], features)
	le.PutUint32(software[16:], uint32(size))
	le.PutUint32(x[size:], fxMagic2)
	return x
}

func cpuid(leaf, subleaf uint32) (a, b, c, d uint32)

// xsaveSize is the size of the standard form of an XSAVE area with these
// features (Intel SDM volume 1, 13.4.3: CPUID leaf 0DH gives size and offset).
func xsaveSize(features uint64) int {
	size := xsaveLegacy
	for i := uint32(2); i < 63; i++ {
		if features>>i&1 != 0 {
			length, offset, _, _ := cpuid(0xd, i)
			size = max(size, int(offset+length))
		}
	}
	return size
}
