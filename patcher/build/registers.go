package build

import (
	"math/bits"
	"slices"
	"strings"

	"golang.org/x/arch/x86/x86asm"
)

// regs is a set of registers that a callee may change under the Microsoft x64
// calling convention: bits 0 to 15 are the general registers by number, then
// XMM0 to XMM5, then the arithmetic flags. Others are in no set.
type regs uint32

const (
	regRAX regs = 1 << iota
	regRCX
	regRDX
	regXMM0  regs = 1 << 16
	regFlags regs = 1 << 22

	regsVolatile  = regRAX | regRCX | regRDX | 0xf<<8 | 0x3f<<16 | regFlags
	regsArguments = regRCX | regRDX | 0x3<<8 | 0xf<<16 // that a function finds its parameters in
)

// name is the register of the lowest bit.
func (r regs) name() string {
	n := bits.TrailingZeros32(uint32(r))
	switch {
	case n < 16:
		return strings.ToLower((x86asm.RAX + x86asm.Reg(n)).String())
	case n < 22:
		return "xmm" + uitoa(uint32(n-16))
	}
	return "the flags"
}

// number is the number of a general register, its parts included, or -1.
func number(r x86asm.Reg) int {
	switch {
	case r >= x86asm.AL && r <= x86asm.BL:
		return int(r - x86asm.AL)
	case r >= x86asm.AH && r <= x86asm.BH:
		return int(r - x86asm.AH)
	case r >= x86asm.SPB && r <= x86asm.R15B:
		return 4 + int(r-x86asm.SPB)
	case r >= x86asm.AX && r <= x86asm.R15W:
		return int(r - x86asm.AX)
	case r >= x86asm.EAX && r <= x86asm.R15L:
		return int(r - x86asm.EAX)
	case r >= x86asm.RAX && r <= x86asm.R15:
		return int(r - x86asm.RAX)
	}
	return -1
}

func regsOf(r x86asm.Reg) regs {
	if n := number(r); n >= 0 {
		return 1 << n & regsVolatile
	}
	if r >= x86asm.X0 && r <= x86asm.X5 {
		return regXMM0 << (r - x86asm.X0)
	}
	return 0
}

// role is what an instruction does with its operands.
type role uint8

const (
	roleUnknown role = iota
	roleWrite        // sets the first, reads the others
	roleChange       // reads all, changes the first
	roleRead         // reads all
	roleBoth         // reads all, changes the first two
	roleNone         // touches none
)

// roles by mnemonic; one that ends in * stands for all that begin so. A part
// of a register that is set counts as the whole: it no longer is the old value.
// Source: Intel SDM volume 2.
var roles = map[role]string{
	roleWrite: `MOV MOVZX MOVSX MOVSXD LEA BSF BSR POPCNT LZCNT TZCNT SET* MOVBE MOVNTI RDRAND
		MOVAPS MOVAPD MOVUPS MOVUPD MOVDQA MOVDQU MOVD MOVQ MOVSS MOVSD_XMM MOVHPS MOVHPD MOVLPS MOVLPD MOVHLPS MOVLHPS
		MOVDDUP MOVSHDUP MOVSLDUP LDDQU MOVNTDQ MOVNTDQA MOVNTPS MOVNTPD MOVMSKPS MOVMSKPD PMOVMSKB PEXTR* EXTRACTPS
		CVT* SQRT* RCPPS RCPSS RSQRT* ROUND* PABS* PMOVSX* PMOVZX* PSHUFD PSHUFHW PSHUFLW`,
	roleChange: `ADD SUB AND OR XOR ADC SBB INC DEC NEG NOT SHL SHR SAR ROL ROR RCL RCR SHLD SHRD BSWAP BTC BTR BTS CMOV* IMUL
		ADDPS ADDPD ADDSS ADDSD SUBPS SUBPD SUBSS SUBSD MULPS MULPD MULSS MULSD DIVPS DIVPD DIVSS DIVSD
		MINPS MINPD MINSS MINSD MAXPS MAXPD MAXSS MAXSD ANDPS ANDPD ANDNPS ANDNPD ORPS ORPD XORPS XORPD
		CMPPS CMPPD CMPSS CMPSD_XMM SHUFPS SHUFPD UNPCK* HADD* HSUB* PADD* PSUB* PAND PANDN POR PXOR PAVG* PCMPEQ* PCMPGT*
		PMUL* PMADD* PMIN* PMAX* PSADBW PSHUFB PSIGN* PSLL* PSRA* PSRL* PUNPCK* PACK* PALIGNR PINSR* INSERTPS PBLENDW BLENDPS BLENDPD`,
	roleRead: `CMP TEST BT COMIS* UCOMIS* PTEST JA JAE JB JBE JE JG JGE JL JLE JNE JNO JNP JNS JO JP JS`,
	roleBoth: `XCHG XADD`,
	roleNone: `NOP PAUSE PREFETCH* MFENCE LFENCE SFENCE CLC STC CLD EMMS FWAIT PUSH`,
}

// Mnemonics by what they do with the flags, in the same spelling.
const (
	setFlags = `ADD SUB AND OR XOR ADC SBB INC DEC NEG SHL SHR SAR ROL ROR RCL RCR SHLD SHRD BT BTC BTR BTS BSF BSR POPCNT LZCNT TZCNT
		CMP TEST COMIS* UCOMIS* PTEST IMUL MUL DIV IDIV XADD CMPXCHG CLC STC RDRAND`
	useFlags = `ADC SBB RCL RCR CMOV* SET* JA JAE JB JBE JE JG JGE JL JLE JNE JNO JNP JNS JO JP JS`
	// with one register twice they read nothing of it
	sameIsNew = `XOR SUB SBB PXOR XORPS XORPD PSUB* PCMPEQ* PCMPGT* ANDNPS ANDNPD PANDN`
)

// mnemonic tells whether a list as above holds an operation.
func mnemonic(list string, op x86asm.Op) bool {
	name := op.String()
	for _, w := range strings.Fields(list) {
		if begin, all := strings.CutSuffix(w, "*"); w == name || all && strings.HasPrefix(name, begin) {
			return true
		}
	}
	return false
}

// behaviour is what is known of one operation.
type behaviour struct {
	role                        role
	setFlags, useFlags, sameNew bool
}

// behaviours remembers what was looked up.
type behaviours map[x86asm.Op]behaviour

func (m behaviours) of(op x86asm.Op) behaviour {
	b, ok := m[op]
	if ok {
		return b
	}
	for r, list := range roles {
		if mnemonic(list, op) {
			b.role = r
		}
	}
	b.setFlags, b.useFlags, b.sameNew = mnemonic(setFlags, op), mnemonic(useFlags, op), mnemonic(sameIsNew, op)
	m[op] = b
	return b
}

// effect is what an instruction reads and sets of the volatile registers; not
// ok if that is not known. PUSH counts as reading nothing: it may be there for
// the stack pointer's sake. Calls and jumps through memory are the caller's.
func (m behaviours) effect(in x86asm.Inst) (reads, writes regs, ok bool) {
	b := m.of(in.Op)
	if b.setFlags {
		writes |= regFlags
	}
	if b.useFlags {
		reads |= regFlags
	}
	first, second := argument(in, 0), argument(in, 1)
	switch in.Op {
	case x86asm.POP:
		return reads, writes | first, true
	case x86asm.CWD, x86asm.CDQ, x86asm.CQO:
		return regRAX, regRDX, true
	case x86asm.CDQE, x86asm.CWDE, x86asm.CBW:
		return regRAX, regRAX, true
	case x86asm.MUL, x86asm.DIV, x86asm.IDIV:
		reads |= regRAX | first | addresses(in)
		if in.Op != x86asm.MUL {
			reads |= regRDX
		}
		return reads, writes | regRAX | regRDX, true
	case x86asm.CMPXCHG:
		return reads | regRAX | first | second | addresses(in), writes | regRAX | first, true
	case x86asm.STOSB, x86asm.STOSW, x86asm.STOSD, x86asm.STOSQ, x86asm.MOVSB, x86asm.MOVSW, x86asm.MOVSD, x86asm.MOVSQ:
		if in.Op >= x86asm.STOSB && in.Op <= x86asm.STOSW {
			reads |= regRAX
		}
		if slices.ContainsFunc(in.Prefix[:], func(p x86asm.Prefix) bool { return p&0xff == x86asm.PrefixREP }) {
			return reads | regRCX, writes | regRCX, true
		}
		return reads, writes, true
	case x86asm.IMUL:
		switch {
		case in.Args[1] == nil:
			return reads | regRAX | first | addresses(in), writes | regRAX | regRDX, true
		case in.Args[2] != nil:
			return reads | second | addresses(in), writes | first, true
		}
	}
	reads |= addresses(in)
	switch b.role {
	case roleNone:
		return 0, writes, true
	case roleUnknown:
		return 0, 0, false
	case roleWrite:
		return reads | second, writes | first, true
	case roleRead:
		return reads | first | second, writes, true
	case roleBoth:
		if in.Args[0] == in.Args[1] && in.Op == x86asm.XCHG {
			return 0, 0, true
		}
		return reads | first | second, writes | first | second, true
	}
	imm, _ := in.Args[1].(x86asm.Imm)
	switch {
	case b.sameNew && in.Args[0] == in.Args[1]: // XOR ECX, ECX
	case in.Op == x86asm.OR && imm == -1: // a short way to set all bits
	default:
		reads |= first | second | argument(in, 2)
	}
	return reads, writes | first, true
}

// argument is the register that operand i is, none for memory and numbers.
func argument(in x86asm.Inst, i int) regs {
	if r, ok := in.Args[i].(x86asm.Reg); ok {
		return regsOf(r)
	}
	return 0
}

// addresses are the registers that memory operands are reckoned from.
func addresses(in x86asm.Inst) regs {
	var r regs
	for _, a := range in.Args {
		if m, ok := a.(x86asm.Mem); ok {
			r |= regsOf(m.Base) | regsOf(m.Index)
		}
	}
	return r
}
