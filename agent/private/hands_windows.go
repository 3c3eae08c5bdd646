package private

import (
	"errors"
	"fmt"
	"io/fs"
	"unsafe"

	"golang.org/x/sys/windows"
)

// ErrLink is the error for a junction, a symbolic link or another reparse point
// where a file or folder itself is wanted: whoever made it would say what is meant.
var ErrLink = errors.New("is a link (a reparse point), not the thing itself")

// ErrStranger is the error for a file or folder that somebody commands who is
// neither SYSTEM, Administrators, Windows itself, our own user, nor trusted.
var ErrStranger = errors.New("somebody else commands it")

// stranger keeps the sentence free of ErrStranger's.
type stranger struct{ text string }

func (s stranger) Error() string        { return s.text }
func (s stranger) Is(target error) bool { return target == ErrStranger }

// CheckOwner refuses what is a link (ErrLink), and what belongs to a stranger
// (ErrStranger). who are SIDs to be trusted beside our own user.
func CheckOwner(path string, who ...string) error {
	return within(path, 0, func(h windows.Handle) error { return judgeOwner(h, path, who) })
}

// CheckHands is CheckOwner, and refuses also what a stranger may write to,
// delete, or give rights on.
func CheckHands(path string, who ...string) error {
	return within(path, 0, func(h windows.Handle) error {
		d, err := read(h)
		if err != nil {
			return &fs.PathError{Op: "read the rights of", Path: path, Err: err}
		}
		return verdict(path, d, who)
	})
}

// Protect gives an existing file or folder the DACL of an SDDL text, protected
// from what would be inherited, if CheckOwner does not refuse it. Look and change
// are made on one handle: nothing else can take the path's place between them.
func Protect(path, sddl string, who ...string) error {
	sd, err := windows.SecurityDescriptorFromString(sddl)
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", path, err)
	}
	dacl, _, err := sd.DACL()
	if err != nil {
		return fmt.Errorf("cannot protect %s: %w", path, err)
	}
	return within(path, windows.WRITE_DAC, func(h windows.Handle) error {
		if err := judgeOwner(h, path, who); err != nil {
			return err
		}
		err := windows.SetSecurityInfo(h, windows.SE_FILE_OBJECT,
			windows.DACL_SECURITY_INFORMATION|windows.PROTECTED_DACL_SECURITY_INFORMATION, nil, nil, dacl, nil)
		if err != nil {
			return fmt.Errorf("cannot protect %s: %w", path, err)
		}
		return nil
	})
}

// within opens what stands at the path itself, and never what it points to.
func within(path string, more uint32, do func(windows.Handle) error) error {
	fail := func(err error) error { return &fs.PathError{Op: "open", Path: path, Err: err} }
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return fail(err)
	}
	h, err := windows.CreateFile(name, windows.READ_CONTROL|windows.FILE_READ_ATTRIBUTES|more,
		windows.FILE_SHARE_READ|windows.FILE_SHARE_WRITE|windows.FILE_SHARE_DELETE, nil, windows.OPEN_EXISTING,
		windows.FILE_FLAG_OPEN_REPARSE_POINT|windows.FILE_FLAG_BACKUP_SEMANTICS, 0)
	if err != nil {
		return fail(err)
	}
	defer windows.CloseHandle(h)
	var held windows.ByHandleFileInformation
	if err := windows.GetFileInformationByHandle(h, &held); err != nil {
		return fail(err)
	}
	// The handle's word is the one that counts. The path's costs nothing, and is
	// had also where a file system follows links whatever it is asked.
	seen, err := windows.GetFileAttributes(name)
	if err != nil {
		return fail(err)
	}
	if (held.FileAttributes|seen)&windows.FILE_ATTRIBUTE_REPARSE_POINT != 0 {
		return fmt.Errorf("%s %w", path, ErrLink)
	}
	return do(h)
}

func judgeOwner(h windows.Handle, path string, who []string) error {
	d, err := read(h)
	if err != nil {
		return &fs.PathError{Op: "read the rights of", Path: path, Err: err}
	}
	return verdict(path, descriptor{owner: d.owner}, who)
}

func verdict(path string, d descriptor, who []string) error {
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		return fmt.Errorf("cannot tell who we are: %w", err)
	}
	if why := judge(d, append([]string{user.User.Sid.String()}, who...)...); why != "" {
		return stranger{path + ": " + why}
	}
	return nil
}

func read(h windows.Handle) (descriptor, error) {
	sd, err := windows.GetSecurityInfo(h, windows.SE_FILE_OBJECT, windows.OWNER_SECURITY_INFORMATION|windows.DACL_SECURITY_INFORMATION)
	if err != nil {
		return descriptor{}, err
	}
	return parse(sd)
}

// parse takes a security descriptor apart. An entry of a kind whose SID stands
// elsewhere keeps its kind only.
func parse(sd *windows.SECURITY_DESCRIPTOR) (d descriptor, err error) {
	owner, _, err := sd.Owner()
	if err == nil && owner != nil {
		d.owner = owner.String()
	} else if err != nil && !errors.Is(err, windows.ERROR_OBJECT_NOT_FOUND) {
		return d, err
	}
	dacl, _, err := sd.DACL()
	if errors.Is(err, windows.ERROR_OBJECT_NOT_FOUND) || err == nil && dacl == nil {
		d.noDACL = true
		return d, nil
	}
	if err != nil {
		return d, err
	}
	for i := range uint32(dacl.AceCount) {
		var ace *windows.ACCESS_ALLOWED_ACE
		if err := windows.GetAce(dacl, i, &ace); err != nil {
			return d, err
		}
		e := entry{kind: ace.Header.AceType, flags: ace.Header.AceFlags}
		switch e.kind {
		case aceAllowed, aceDenied, aceAllowedCallback, aceDeniedCallback: // all four are laid out alike
			e.rights = uint32(ace.Mask)
			e.sid = (*windows.SID)(unsafe.Pointer(&ace.SidStart)).String()
		}
		d.entries = append(d.entries, e)
	}
	return d, nil
}
