//go:build windows && (amd64 || arm64)

package win32

import (
	"unsafe"

	"golang.org/x/sys/windows"
)

// enableDebugPrivilege lets administrators open processes of others.
func enableDebugPrivilege() error {
	var t windows.Token
	if err := windows.OpenProcessToken(windows.CurrentProcess(), windows.TOKEN_ADJUST_PRIVILEGES|windows.TOKEN_QUERY, &t); err != nil {
		return err
	}
	defer t.Close()
	p := windows.Tokenprivileges{PrivilegeCount: 1}
	name, err := windows.UTF16PtrFromString("SeDebugPrivilege")
	if err != nil {
		return err
	}
	if err := windows.LookupPrivilegeValue(nil, name, &p.Privileges[0].Luid); err != nil {
		return err
	}
	p.Privileges[0].Attributes = windows.SE_PRIVILEGE_ENABLED
	if err := windows.AdjustTokenPrivileges(t, false, &p, 0, nil, nil); err != nil {
		return err
	}
	// Success is also what it says when the token has no such privilege.
	enabled, err := hasPrivilege(t, p.Privileges[0].Luid)
	if err == nil && !enabled {
		err = windows.ERROR_PRIVILEGE_NOT_HELD
	}
	return err
}

func hasPrivilege(t windows.Token, want windows.LUID) (bool, error) {
	buf := make([]byte, 4<<10) // a token has some forty privileges of 12 bytes at most
	var n uint32
	if err := windows.GetTokenInformation(t, windows.TokenPrivileges, &buf[0], uint32(len(buf)), &n); err != nil {
		return false, err
	}
	list := (*windows.Tokenprivileges)(unsafe.Pointer(&buf[0])).AllPrivileges()
	for _, p := range list {
		if p.Luid == want {
			return p.Attributes&windows.SE_PRIVILEGE_ENABLED != 0, nil
		}
	}
	return false, nil
}
