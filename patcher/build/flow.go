package build

import (
	"encoding/binary"

	"golang.org/x/arch/x86/x86asm"

	"hotpatchd/pe"
)

// endByFlow finds the end of a function that neither an unwind record nor a
// symbol's size bounds: it ends after the first instruction that nothing runs
// on from and no branch before leads beyond. Where an indirect jump may lead
// anywhere, what lies before limit, where the next thing begins, is taken
// whole but for the filler. What cannot be decoded has no certain end.
func (f *file) endByFlow(s pe.Symbol, limit uint32) (uint32, error) {
	code := make([]byte, limit-s.RVA)
	if err := f.Canonical(code, s.RVA); err != nil {
		return 0, damaged(f.role, err)
	}
	step := stepAMD64
	if f.Machine == machineARM64 {
		step = stepARM64
	}
	end, reach, indirect := 0, 0, false
	for i := 0; i < len(code); {
		in, ok := step(code[i:])
		if !ok {
			if end > 0 && allZero(code[i:]) {
				break // zero filler, odd at its end
			}
			why := CodeLength
			if i < longJump {
				why = CodeInstruction
			}
			return 0, refuse(why, f.role, s.Name, s.RVA+uint32(i),
				"only what begins at %x bounds it, and the instruction % x is not known", limit, code[i:min(len(code), i+8)])
		}
		if to := i + in.length + in.distance; in.branches && to < len(code) {
			reach = max(reach, to)
		}
		indirect = indirect || in.indirect
		i += in.length
		if !in.filler {
			end = i
		}
		if in.ends && !indirect && reach < i {
			return s.RVA + uint32(i), nil
		}
	}
	return s.RVA + uint32(end), nil
}

// step is what following the code needs of one instruction.
type step struct {
	length   int
	ends     bool // nothing runs on from it
	branches bool // to distance bytes behind it
	distance int
	indirect bool // a jump that may go through a table
	filler   bool
}

func stepAMD64(b []byte) (step, bool) {
	in, err := decode(b)
	if err != nil {
		return step{}, false
	}
	s := step{length: in.Len, ends: endsFlow(in), filler: filler(b, in)}
	switch to := in.Args[0].(type) {
	case x86asm.Rel:
		s.branches = in.Op != x86asm.CALL
		s.distance = int(to)
	case x86asm.Mem: // a jump through one slot, as to an import, is no table
		s.indirect = in.Op == x86asm.JMP && (to.Base != x86asm.RIP || to.Index != 0)
	case x86asm.Reg:
		s.indirect = in.Op == x86asm.JMP
	}
	return s, true
}

// stepARM64 knows the branches of the A64 instruction set by their masks
// (Arm ARM, "Branches, Exception Generating and System instructions").
func stepARM64(b []byte) (step, bool) {
	if len(b) < 4 {
		return step{}, false
	}
	w := binary.LittleEndian.Uint32(b)
	s := step{length: 4}
	branch := func(shift, bits uint) {
		v := int32(w<<(32-shift-bits)) >> (32 - bits) // sign-extended
		s.branches, s.distance = true, int(v)*4-4
	}
	switch {
	case w&0xfc000000 == 0x14000000: // B
		branch(0, 26)
		s.ends = true
	case w&0xff000010 == 0x54000000, w&0x7e000000 == 0x34000000: // B.cond, CBZ, CBNZ
		branch(5, 19)
	case w&0x7e000000 == 0x36000000: // TBZ, TBNZ
		branch(5, 14)
	case w&0xfffff01f == 0xd65f0000 || w == 0xd65f0bff || w == 0xd65f0fff: // RET, RETAA, RETAB
		s.ends = true
	case w&0xfffff000 == 0xd61f0000 || w&0xfffff000 == 0xd71f0000: // BR, BRAA and kin
		s.ends, s.indirect = true, true
	case w == 0 || w&0xffe0001f == 0xd4200000: // UDF #0, BRK
		s.ends, s.filler = true, true
	case w == 0xd503201f: // NOP
		s.filler = true
	}
	return s, true
}
