//go:build windows && (amd64 || arm64)

package win32

import (
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/windows"

	"hotpatchd/patcher/target"
)

// describer turns what the system tells of a process into an Info. What it
// keeps is about the machine, never about a process. Not safe for concurrent use.
type describer struct {
	self       int
	privileged bool              // SeDebugPrivilege is enabled
	users      map[string]string // by SID
}

// Machine types, as in winnt.h.
const (
	machineUnknown = 0
	machineI386    = 0x14c
	machineARMNT   = 0x1c4
	machineAMD64   = 0x8664
	machineARM64   = 0xaa64
)

// describe fills everything but Change. It is as good as our rights: h is 0 if
// the process cannot even be asked what it is.
func (d *describer) describe(h windows.Handle, e entry) target.Info {
	i := target.Info{ID: e.id, UID: -1, Host: e.name, Image: e.name, Arch: nativeArch}
	if h == 0 {
		i.Guards = append(i.Guards, target.Guard{Code: target.GuardProtected, Text: "the system keeps us out of " + e.name + d.rights()})
		if spared(e.name) { // processes without a program of their own among them, which nobody can open
			i.Guards = append(i.Guards, target.Guard{Code: target.GuardSystem, Text: e.name + " is never touched"})
		}
		return i
	}
	if path := imagePath(h); path != "" {
		i.Image, i.Exe, i.Host = path, path, filepath.Base(path)
	}
	i.User, i.SID = d.user(h)
	i.PEB = peb(h)
	f := asked(h)
	machine, _ := f.machines()
	i.Arch = archOf(machine)
	i.Guards = d.guards(f, i)
	return i
}

func (d *describer) rights() string {
	if d.privileged {
		return ", SeDebugPrivilege notwithstanding"
	}
	return ": SeDebugPrivilege is missing"
}

// imagePath is the path of the program as Windows programs spell it.
func imagePath(h windows.Handle) string {
	for size := uint32(windows.MAX_PATH); size <= 32<<10; size *= 2 {
		b := make([]uint16, size)
		n := size
		err := windows.QueryFullProcessImageName(h, 0, &b[0], &n)
		if err == nil {
			return windows.UTF16ToString(b[:n])
		}
		if err != windows.ERROR_INSUFFICIENT_BUFFER {
			break
		}
	}
	return ""
}

// user is the owner's name, or the SID where there is no name, and the SID.
func (d *describer) user(h windows.Handle) (name, sid string) {
	var t windows.Token
	if windows.OpenProcessToken(h, windows.TOKEN_QUERY, &t) != nil {
		return "", ""
	}
	defer t.Close()
	u, err := t.GetTokenUser()
	if err != nil {
		return "", ""
	}
	sid = u.User.Sid.String()
	name, ok := d.users[sid]
	if !ok {
		name = sid
		if account, domain, _, err := u.User.Sid.LookupAccount(""); err == nil && account != "" {
			if name = account; domain != "" {
				name = domain + `\` + account
			}
		}
		d.users[sid] = name
	}
	return name, sid
}

// peb is the address of the process environment block, 0 if we may not ask.
func peb(h windows.Handle) target.Addr {
	var basic windows.PROCESS_BASIC_INFORMATION
	if query(h, windows.ProcessBasicInformation, &basic) != nil {
		return 0
	}
	return target.Addr(uintptr(unsafe.Pointer(basic.PebBaseAddress)))
}

func archOf(machine uint16) target.Arch {
	switch machine {
	case machineAMD64:
		return target.AMD64
	case machineARM64:
		return target.ARM64
	case machineI386:
		return target.X86
	case machineARMNT:
		return "arm"
	}
	return nativeArch
}
