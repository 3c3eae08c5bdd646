package probe

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/eligibility"
)

// Collect reads the facts of the device it runs on. rights asks the backend
// what the system lets it do (target.Prober's Probe fits); it is bounded by ctx.
// What the owner's policy says is not a fact and not asked here.
func Collect(ctx context.Context, rights func(context.Context) (string, error)) eligibility.Facts {
	return this.collect(ctx, rights)
}

// DeviceID is a stable name of this device: SHA-256 of a prefix of ours and the
// MachineGuid, as 64 hexadecimal digits.
func DeviceID() (string, error) { return this.deviceID() }

// SystemImage tells whether Windows hotpatches the image of a file itself on
// this device. What decides it changes with a restart only.
func SystemImage(path string) bool {
	s := system()
	return s.folder != "" && systemImage(path, s.folder, s.engine)
}

var system = sync.OnceValue(func() (s struct {
	folder string
	engine eligibility.Fact
}) {
	s.engine = this.Engine()
	s.folder, _ = windows.GetSystemWindowsDirectory()
	return s
})

var this = device{localMachine{}, calls{}}

// calls asks the running Windows.
type calls struct{}

var (
	kernel32           = windows.NewLazySystemDLL("kernel32.dll")
	ntdll              = windows.NewLazySystemDLL("ntdll.dll")
	isWow64Process2    = kernel32.NewProc("IsWow64Process2") // Windows 10 1511
	ntManageHotPatch   = ntdll.NewProc("NtManageHotPatch")   // Windows 10 1809
	errNoSuchCall      = errors.New("this Windows does not have the call")
	errNothingReported = errors.New("the system reported nothing")
)

func (calls) Version() (osVersion, error) {
	v := windows.RtlGetVersion()
	if v.BuildNumber == 0 {
		return osVersion{}, errNothingReported
	}
	const workstation = 1 // VER_NT_WORKSTATION
	return osVersion{v.MajorVersion, v.MinorVersion, v.BuildNumber, v.ProductType != workstation}, nil
}

func (calls) Machine() (uint16, error) {
	if isWow64Process2.Find() != nil {
		return 0, errNoSuchCall
	}
	var process, native uint16
	if err := windows.IsWow64Process2(windows.CurrentProcess(), &process, &native); err != nil {
		return 0, err
	}
	return native, nil
}

func (calls) Isolated() (byte, error) {
	// SYSTEM_ISOLATED_USER_MODE_INFORMATION: 8 bytes of flags, 8 spare.
	var info [16]byte
	var n uint32
	if err := windows.NtQuerySystemInformation(windows.SystemIsolatedUserModeInformation, unsafe.Pointer(&info), uint32(len(info)), &n); err != nil {
		return 0, status(err)
	}
	return info[0], nil
}

func (calls) Engine() (bool, error) {
	if ntManageHotPatch.Find() != nil {
		return false, errNoSuchCall
	}
	const checkEnabled = 9
	info := struct{ version, flags uint32 }{version: 1}
	var n uint32
	code, _, _ := ntManageHotPatch.Call(checkEnabled, uintptr(unsafe.Pointer(&info)), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&n)))
	switch s := windows.NTStatus(code); s {
	case windows.STATUS_SUCCESS:
		return true, nil
	case windows.STATUS_NOT_SUPPORTED:
		return false, nil
	default:
		return false, status(s)
	}
}

// status words an NTSTATUS with its number, by which it can be looked up.
func status(err error) error {
	var s windows.NTStatus
	if errors.As(err, &s) {
		number := fmt.Sprintf("NTSTATUS %#x", uint32(s))
		if strings.Contains(err.Error(), number) { // a number is all that x/sys has for it
			return err
		}
		return fmt.Errorf("%w (%s)", err, number)
	}
	return err
}

func (calls) Token() (token, error) {
	t := windows.GetCurrentProcessToken()
	u, err := t.GetTokenUser()
	if err != nil {
		return token{}, err
	}
	out := token{user: u.User.Sid.String(), elevated: t.IsElevated()}
	if account, domain, _, err := u.User.Sid.LookupAccount(""); err == nil && account != "" {
		out.user = domain + `\` + account
	}
	name, err := windows.UTF16PtrFromString("SeDebugPrivilege")
	if err != nil {
		return token{}, err
	}
	var luid windows.LUID
	if err := windows.LookupPrivilegeValue(nil, name, &luid); err != nil {
		return token{}, err
	}
	var buf [4 << 10]byte // a token has some forty privileges of 12 bytes at most
	var n uint32
	if err := windows.GetTokenInformation(t, windows.TokenPrivileges, &buf[0], uint32(len(buf)), &n); err != nil {
		return token{}, err
	}
	for _, p := range (*windows.Tokenprivileges)(unsafe.Pointer(&buf[0])).AllPrivileges() {
		out.debug = out.debug || p.Luid == luid // there, whether or not it is switched on now
	}
	return out, nil
}

// timeOfDay is SYSTEM_TIMEOFDAY_INFORMATION (phnt, ntexapi.h).
type timeOfDay struct {
	boot, current, zoneBias int64
	zoneID, reserved        uint32
	bootBias, sleepBias     uint64
}

var queryUnbiasedInterruptTime = windows.NewLazySystemDLL("kernel32.dll").NewProc("QueryUnbiasedInterruptTime")

// Slept is how long the system has been asleep since its start: GetTickCount64
// counts sleep and hibernation, QueryUnbiasedInterruptTime, in 100 ns, does not.
// It is never negative, and zero where that is not known.
func Slept() time.Duration {
	var awake uint64
	if queryUnbiasedInterruptTime.Find() != nil {
		return 0
	}
	if ok, _, _ := queryUnbiasedInterruptTime.Call(uintptr(unsafe.Pointer(&awake))); ok == 0 {
		return 0
	}
	return max(0, windows.DurationSinceBoot()-time.Duration(awake)*100)
}

// BootID names this boot of the system: the moment of its start, as the clock
// was then: setting the clock moves boot and bootBias alike. "" where it cannot be told.
func BootID() string {
	var t timeOfDay
	var n uint32
	if err := windows.NtQuerySystemInformation(windows.SystemTimeOfDayInformation, unsafe.Pointer(&t), uint32(unsafe.Sizeof(t)), &n); err != nil || t.boot == 0 {
		return ""
	}
	return fmt.Sprintf("%016x", uint64(t.boot)-t.bootBias)
}
