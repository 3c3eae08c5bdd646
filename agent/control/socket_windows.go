package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

const defaultSocket = `\\.\pipe\hotpatchd`

// pipePrefix begins the name of every pipe on this machine. A name with a
// server in place of the dot would have us log on there.
const pipePrefix = `\\.\pipe\`

const (
	// maxPipe bounds a pipe's name, in characters (CreateNamedPipe).
	maxPipe = 256
	// dialWait bounds a connection to the pipe: it is made at once, unless
	// more come at one moment than instances wait.
	dialWait = 5 * time.Second
	// busyWait is between two tries where all instances are taken.
	busyWait = 5 * time.Millisecond
	// pipeAccess is reading and writing without FILE_CREATE_PIPE_INSTANCE, which
	// GENERIC_WRITE has in it: FILE_GENERIC_READ | FILE_GENERIC_WRITE &^ FILE_APPEND_DATA.
	pipeAccess = 0x12019b
)

var waitNamedPipe = windows.NewLazySystemDLL("kernel32.dll").NewProc("WaitNamedPipeW")

// checkPipe refuses what is no pipe of this machine.
func checkPipe(address string) error {
	name := address
	if len(name) >= len(pipePrefix) && strings.EqualFold(name[:len(pipePrefix)], pipePrefix) {
		name = name[len(pipePrefix):]
	} else {
		return fmt.Errorf(`not a pipe of this machine, which is \\.\pipe\NAME`)
	}
	switch {
	case name == "":
		return errors.New("the pipe has no name")
	case len(address) > maxPipe:
		return fmt.Errorf("a pipe's name has at most %d characters", maxPipe)
	case strings.ContainsRune(address, 0):
		return errors.New("the name holds a zero")
	}
	return nil
}

func listen(address string) (net.Listener, error) {
	if err := checkPipe(address); err != nil {
		return nil, fmt.Errorf("cannot listen on %q: %w", address, err)
	}
	security, err := pipeSecurity()
	if err != nil {
		return nil, fmt.Errorf("cannot protect the pipe: %w", err)
	}
	if owner, taken := pipeOwner(address); taken {
		return nil, fmt.Errorf("cannot listen on %s%s: %w", address, owner, ErrInUse)
	}
	l, err := newPipeListener(address, security)
	// Another one was faster, or has a pipe there that is not for us.
	if errors.Is(err, windows.ERROR_ACCESS_DENIED) || errors.Is(err, windows.ERROR_PIPE_BUSY) {
		owner, _ := pipeOwner(address)
		return nil, fmt.Errorf("cannot listen on %s%s: %w", address, owner, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", address, err)
	}
	return l, nil
}

// pipeOwner tells whether there is a pipe by that name, and whose, in words, if
// it can be asked. A question to the pipe itself would take a connection.
func pipeOwner(address string) (owner string, taken bool) {
	name, err := windows.UTF16PtrFromString(address)
	if err != nil {
		return "", false
	}
	const briefly = 1 // millisecond; 0 would be the pipe's own default
	ok, _, err := waitNamedPipe.Call(uintptr(unsafe.Pointer(name)), briefly)
	if ok == 0 && !errors.Is(err, windows.ERROR_SEM_TIMEOUT) && !errors.Is(err, windows.ERROR_ACCESS_DENIED) {
		return "", false
	}
	h, err := windows.CreateFile(name, windows.FILE_READ_ATTRIBUTES, 0, nil, windows.OPEN_EXISTING, windows.SECURITY_SQOS_PRESENT|windows.SECURITY_ANONYMOUS, 0)
	if err != nil {
		return "", true
	}
	defer windows.CloseHandle(h)
	var pid uint32
	if err := windows.GetNamedPipeServerProcessId(h, &pid); err != nil || pid == 0 {
		return "", true
	}
	return fmt.Sprintf(" (taken by process %d)", pid), true
}

// descriptor lets SYSTEM and Administrators do everything and every user of
// this machine connect, without the right to make an instance in which he would
// take our place. owner is the SID of the daemon's user, admin that he is an
// administrator. Connections from other machines are not refused here but by
// PIPE_REJECT_REMOTE_CLIENTS: who has logged on over the network (SSH, remoting)
// is a local client like any other.
func descriptor(owner string, admin bool) string {
	if admin {
		owner = "BA"
	}
	sddl := "O:" + owner + "D:P(A;;GA;;;SY)(A;;GA;;;BA)"
	if !admin {
		sddl += "(A;;GA;;;" + owner + ")"
	}
	return sddl + fmt.Sprintf("(A;;%#x;;;AU)", pipeAccess)
}

func pipeSecurity() (*windows.SecurityAttributes, error) {
	own, err := ownCaller()
	if err != nil {
		return nil, err
	}
	sd, err := windows.SecurityDescriptorFromString(descriptor(own.SID, own.UID == 0))
	if err != nil {
		return nil, err
	}
	sa := &windows.SecurityAttributes{SecurityDescriptor: sd}
	sa.Length = uint32(unsafe.Sizeof(*sa))
	return sa, nil
}

func dial(ctx context.Context, address string) (net.Conn, error) {
	if err := checkPipe(address); err != nil {
		return nil, err
	}
	name, err := windows.UTF16PtrFromString(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	for {
		// Identification lets the daemon see who we are, and no more: it cannot act for us.
		h, err := windows.CreateFile(name, pipeAccess, 0, nil, windows.OPEN_EXISTING,
			windows.FILE_FLAG_OVERLAPPED|windows.SECURITY_SQOS_PRESENT|windows.SECURITY_IDENTIFICATION, 0)
		if err == nil {
			if err := trusted(h); err != nil {
				windows.CloseHandle(h)
				return nil, err
			}
			return newPipeConn(h, address), nil
		}
		if err != windows.ERROR_PIPE_BUSY {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("all instances of the pipe are taken: %w", ctx.Err())
		case <-time.After(busyWait):
		}
	}
}

// trusted refuses a pipe that an ordinary user made under the daemon's name,
// unless that user is ourselves.
func trusted(h windows.Handle) error {
	sd, err := windows.GetSecurityInfo(h, windows.SE_KERNEL_OBJECT, windows.OWNER_SECURITY_INFORMATION)
	if err != nil {
		return fmt.Errorf("cannot tell whose pipe this is: %w", err)
	}
	owner, _, err := sd.Owner()
	if err != nil || owner == nil {
		return fmt.Errorf("cannot tell whose pipe this is: %w", err)
	}
	if owner.IsWellKnown(windows.WinLocalSystemSid) || owner.IsWellKnown(windows.WinBuiltinAdministratorsSid) {
		return nil
	}
	own, err := ownCaller()
	if err == nil && own.SID == owner.String() {
		return nil
	}
	return fmt.Errorf("the pipe belongs to %s, who is not an administrator: this is not the daemon", owner)
}
