//go:build windows && (amd64 || arm64)

package win32

import (
	"fmt"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

var (
	isProcessCritical          = kernel32.NewProc("IsProcessCritical")
	getProcessMitigationPolicy = kernel32.NewProc("GetProcessMitigationPolicy")
	getProcessInformation      = kernel32.NewProc("GetProcessInformation")
	isWow64Process2            = kernel32.NewProc("IsWow64Process2")
)

// neverTouch are the programs on which a machine stands or falls, and those
// that watch over it and would take us for an intruder. Compared without case.
var neverTouch = []string{
	"smss.exe", "csrss.exe", "wininit.exe", "winlogon.exe", "services.exe", "lsass.exe", "lsaiso.exe", "fontdrvhost.exe", "dwm.exe",
	"registry", "memcompression", "secure system", "vmmem", "vmmemwsl",
	"msmpeng.exe", "mpdefendercoreservice.exe", "nissrv.exe", "mssense.exe", "sensendr.exe", "senseir.exe", "sensecncproxy.exe", "securityhealthservice.exe",
	"csfalconservice.exe", "csfalconcontainer.exe", "sentinelagent.exe", "sentinelservicehost.exe", "cylancesvc.exe", "cb.exe", "repmgr.exe",
	"elastic-endpoint.exe", "osqueryd.exe", "wazuh-agent.exe", "ossec-agent.exe", "ekrn.exe", "avp.exe", "bdservicehost.exe", "sophosfs.exe", "sedservice.exe",
	"ccsvchst.exe", "mfemms.exe", "xagt.exe", "cyserver.exe", "tmccsf.exe",
}

// spared tells whether a program is one of neverTouch.
func spared(name string) bool { return slices.Contains(neverTouch, strings.ToLower(name)) }

// facts are what Windows tells of a process that may speak against touching
// it. asked is the real one. known is false where this Windows cannot tell: that
// is no guard, the call itself will be refused then, before any effect.
type facts interface {
	critical() bool
	debugged() bool
	protection() (kind byte, known bool)
	mitigation(policy uintptr) (flags uint32, known bool)
	machines() (process, native uint16)
}

// asked answers by the calls of a process handle.
type asked windows.Handle

// guards are what speaks against touching a process.
func (d *describer) guards(f facts, i target.Info) []target.Guard {
	var g []target.Guard
	add := func(code target.GuardCode, format string, args ...any) {
		g = append(g, target.Guard{Code: code, Text: fmt.Sprintf(format, args...)})
	}
	if i.PID == d.self {
		add(target.GuardSelf, "this is the daemon itself")
	}
	kind, _ := f.protection()
	if kind != 0 {
		add(target.GuardProtected, "a protected process (%s)", protectionText(kind))
	}
	switch {
	case spared(i.Host):
		add(target.GuardSystem, "%s is never touched", i.Host)
	case f.critical():
		add(target.GuardSystem, "%s is critical to the system: its end would be the machine's", i.Host)
	case kind != 0:
		// That we are kept out of it is as it should be, and no gap in what we see.
		add(target.GuardSystem, "only images signed for its protection come into %s: it is never touched", i.Host)
	}
	switch machine, native := f.machines(); {
	case machine == machineI386 || machine == machineARMNT:
		add(target.Guard32Bit, "a 32-bit program")
	case machine != native:
		add(target.GuardEmulated, "%s code on an %s machine", archOf(machine), archOf(native))
	}
	if f.debugged() {
		add(target.GuardTracer, "a debugger is attached")
	}
	if p, ok := f.mitigation(dynamicCodePolicy); ok && p&prohibitDynamicCode != 0 {
		add(target.GuardDynamicCode, "arbitrary code guard is on: no new code in its memory")
	}
	if p, ok := f.mitigation(signaturePolicy); ok && p&(microsoftSignedOnly|storeSignedOnly|mitigationOptIn) != 0 {
		add(target.GuardSigned, "code integrity guard is on: only images signed as it asks for")
	}
	return g
}

func (h asked) critical() bool {
	var yes int32
	_, err := win(isProcessCritical, uintptr(h), uintptr(unsafe.Pointer(&yes)))
	return err == nil && yes != 0
}

// debugged asks for the debug port. No answer is no.
func (h asked) debugged() bool {
	var port uintptr
	return query(windows.Handle(h), windows.ProcessDebugPort, &port) == nil && port != 0
}

// processProtectionInformation is the class of PS_PROTECTION: type in the low
// three bits, signer in the high four (ntddk.h).
const processProtectionInformation = 61

func (h asked) protection() (kind byte, known bool) {
	err := query(windows.Handle(h), processProtectionInformation, &kind)
	return kind & 7, err == nil
}

func protectionText(kind byte) string {
	if kind == 1 {
		return "light"
	}
	return "full"
}

// Policies and their bits, as in winnt.h.
const (
	dynamicCodePolicy   = 2 // ProcessDynamicCodePolicy
	prohibitDynamicCode = 1 << 0
	signaturePolicy     = 8 // ProcessSignaturePolicy
	microsoftSignedOnly = 1 << 0
	storeSignedOnly     = 1 << 1
	mitigationOptIn     = 1 << 2
)

func (h asked) mitigation(policy uintptr) (flags uint32, known bool) {
	_, err := win(getProcessMitigationPolicy, uintptr(h), policy, uintptr(unsafe.Pointer(&flags)), unsafe.Sizeof(flags))
	return flags, err == nil
}

// processMachineTypeInfo is the class of PROCESS_MACHINE_INFORMATION (Windows 11).
const processMachineTypeInfo = 9

// machines are the machine of the process's code and that of the system. Only
// the newer call tells of amd64 code on arm64, which is no WOW64.
func (h asked) machines() (process, native uint16) {
	if isWow64Process2.Find() == nil {
		_ = windows.IsWow64Process2(windows.Handle(h), &process, &native)
	}
	if native == machineUnknown {
		native = nativeMachine
	}
	var m struct {
		machine, reserved uint16
		attributes        uint32
	}
	if _, err := win(getProcessInformation, uintptr(h), processMachineTypeInfo, uintptr(unsafe.Pointer(&m)), unsafe.Sizeof(m)); err == nil && m.machine != machineUnknown {
		process = m.machine
	}
	if process == machineUnknown {
		process = native
	}
	return process, native
}
