package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/svc/mgr"
)

// hardening is one property of the service: how it is set, and whether the
// manager has it as it was set.
type hardening struct {
	what string
	set  func(*mgr.Service) error
	kept func(*mgr.Service) (bool, error)
}

// recovery is what follows a failure: the third action is for all later ones.
// A crash loses nothing, and a wrong configuration is not tried at full speed for ever.
var recovery = []mgr.RecoveryAction{
	{Type: mgr.ServiceRestart, Delay: 2 * time.Second},
	{Type: mgr.ServiceRestart, Delay: 10 * time.Second},
	{Type: mgr.ServiceRestart, Delay: time.Minute},
}

// failureReset is after how many quiet seconds failures are counted anew.
const failureReset = 3600

// preshutdownWait is how long the system waits for us when it goes down: as
// long as we give ourselves, and some.
const preshutdownWait = stopWait + 10*time.Second

// privileges are all that the service keeps of SYSTEM's: to open processes of
// others, to pass through folders (which everyone may), and to see who calls on the pipe.
var privileges = []string{"SeDebugPrivilege", "SeChangeNotifyPrivilege", "SeImpersonatePrivilege"}

var hardenings = []hardening{
	{"recovery actions",
		func(s *mgr.Service) error { return s.SetRecoveryActions(recovery, failureReset) },
		func(s *mgr.Service) (bool, error) {
			got, err := s.RecoveryActions()
			return slices.Equal(got, recovery), err
		}},
	{"recovery after errors",
		func(s *mgr.Service) error { return s.SetRecoveryActionsOnNonCrashFailures(true) },
		func(s *mgr.Service) (bool, error) { return s.RecoveryActionsOnNonCrashFailures() }},
	{"a service SID",
		func(s *mgr.Service) error {
			return setNumber(s, windows.SERVICE_CONFIG_SERVICE_SID_INFO, windows.SERVICE_SID_TYPE_UNRESTRICTED)
		},
		func(s *mgr.Service) (bool, error) {
			return hasNumber(s, windows.SERVICE_CONFIG_SERVICE_SID_INFO, windows.SERVICE_SID_TYPE_UNRESTRICTED)
		}},
	{"the time to stop at shutdown",
		func(s *mgr.Service) error {
			return setNumber(s, windows.SERVICE_CONFIG_PRESHUTDOWN_INFO, uint32(preshutdownWait.Milliseconds()))
		},
		func(s *mgr.Service) (bool, error) {
			return hasNumber(s, windows.SERVICE_CONFIG_PRESHUTDOWN_INFO, uint32(preshutdownWait.Milliseconds()))
		}},
	{"required privileges", setPrivileges, hasPrivileges},
}

// setNumber sets a property that is one DWORD.
func setNumber(s *mgr.Service, level, n uint32) error {
	return windows.ChangeServiceConfig2(s.Handle, level, (*byte)(unsafe.Pointer(&n)))
}

func hasNumber(s *mgr.Service, level, want uint32) (bool, error) {
	var got, n uint32
	err := windows.QueryServiceConfig2(s.Handle, level, (*byte)(unsafe.Pointer(&got)), uint32(unsafe.Sizeof(got)), &n)
	return got == want, err
}

// requiredPrivileges is SERVICE_REQUIRED_PRIVILEGES_INFO: names that end with a
// zero each, and one more.
type requiredPrivileges struct{ names *uint16 }

func setPrivileges(s *mgr.Service) error {
	var block []uint16
	for _, p := range privileges {
		u, err := windows.UTF16FromString(p)
		if err != nil {
			return err
		}
		block = append(block, u...)
	}
	info := requiredPrivileges{&append(block, 0)[0]}
	return windows.ChangeServiceConfig2(s.Handle, windows.SERVICE_CONFIG_REQUIRED_PRIVILEGES_INFO, (*byte)(unsafe.Pointer(&info)))
}

func hasPrivileges(s *mgr.Service) (bool, error) {
	b := make([]byte, 8<<10) // the most that QueryServiceConfig2 wants
	var n uint32
	if err := windows.QueryServiceConfig2(s.Handle, windows.SERVICE_CONFIG_REQUIRED_PRIVILEGES_INFO, &b[0], uint32(len(b)), &n); err != nil {
		return false, err
	}
	at := unsafe.Pointer((*requiredPrivileges)(unsafe.Pointer(&b[0])).names)
	var got []string
	for at != nil && len(got) <= len(privileges) {
		p := windows.UTF16PtrToString((*uint16)(at))
		if p == "" {
			break
		}
		got = append(got, p)
		at = unsafe.Add(at, 2*(len(p)+1))
	}
	slices.Sort(got)
	want := slices.Sorted(slices.Values(privileges))
	return slices.Equal(got, want), nil
}

// firstOfAll is what main does before anything else: what this program loads
// comes from the system's folder, never from where a stranger could put it, and
// a program of another architecture, which Windows would emulate, does not work
// on processes that are not emulated.
func firstOfAll() error {
	if err := fixedProgramData(); err != nil {
		return err
	}
	if p := windows.NewLazySystemDLL("kernel32.dll").NewProc("SetDefaultDllDirectories"); p.Find() == nil {
		if err := windows.SetDefaultDllDirectories(windows.LOAD_LIBRARY_SEARCH_SYSTEM32); err != nil {
			return fmt.Errorf("cannot keep foreign DLLs out: %w", err)
		}
	}
	if p := windows.NewLazySystemDLL("kernel32.dll").NewProc("IsWow64Process2"); p.Find() != nil {
		return nil // older than Windows 10 1511; there is no ARM64 Windows that old
	}
	var process, native uint16
	if err := windows.IsWow64Process2(windows.CurrentProcess(), &process, &native); err != nil {
		return fmt.Errorf("cannot tell whether this program is emulated: %w", err)
	}
	return emulated(runtime.GOARCH, process, native)
}

// emulated refuses a program that the machine does not run itself. process is
// 0 for any 64-bit program, an emulated x64 one on ARM64 too.
func emulated(goarch string, process, native uint16) error {
	own := map[string]uint16{"amd64": 0x8664, "arm64": 0xaa64}[goarch]
	if process == 0 && own == native && own != 0 {
		return nil
	}
	machine := map[uint16]string{0x8664: "amd64", 0xaa64: "arm64", 0x14c: "386"}[native]
	if machine == "" {
		machine = fmt.Sprintf("%#x", native)
	}
	return &hintedError{fmt.Errorf("this hotpatchd is for %s, the machine is %s: emulated it cannot work", goarch, machine), "install the hotpatchd for " + machine}
}

// fixedProgramData makes the folder of all defaults what the system says, for
// whoever starts us: an environment is the caller's word, and differs between a
// service and a console.
func fixedProgramData() error {
	dir, err := windows.KnownFolderPath(windows.FOLDERID_ProgramData, 0)
	if err == nil {
		err = os.Setenv("ProgramData", dir)
	}
	if err != nil {
		return fmt.Errorf("cannot find the folder ProgramData: %w", err)
	}
	return nil
}
