package patcher

import (
	"hotpatchd/patcher/target"
)

// guardRemedy says which guards block, and what ends them. A guard that is
// missing here is harmless to what we do (mdwe: annex code is mapped r-x at
// once and filled from outside).
var guardRemedy = map[target.GuardCode]Remedy{
	target.GuardTracer:    Wait,
	target.GuardSeccomp:   RestartProcess,
	target.GuardDispatch:  RestartProcess,
	target.GuardProtected: RestartProcess,
	target.Guard32Bit:     Author,
	target.GuardEmulated:  Author,
	target.GuardSelf:      Policy,
	target.GuardSystem:    Policy,
	target.GuardShared:    RestartProcess,
	target.GuardKernel:    Policy,

	target.GuardDynamicCode: Policy,
	target.GuardSigned:      Policy,
}

// CheckGuards is the first rule of every effect: nil, or the refusal that the
// process's guards call for.
func CheckGuards(info target.Info) error {
	for _, g := range info.Guards {
		remedy, blocks := guardRemedy[g.Code]
		if !blocks {
			continue
		}
		return &Refusal{Reason: Blocked, Code: string(g.Code), Remedy: remedy, Text: g.Text}
	}
	return nil
}
