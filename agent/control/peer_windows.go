package control

import (
	"fmt"
	"net"
	"os/user"
	"runtime"
	"strings"

	"golang.org/x/sys/windows"
)

// rootName is what changing things needs besides the group, in refusals.
const rootName = "an administrator's rights"

var impersonateNamedPipeClient = windows.NewLazySystemDLL("advapi32.dll").NewProc("ImpersonateNamedPipeClient")

// identify asks the system who is at the other end of a pipe's server end.
// ERROR_CANNOT_IMPERSONATE: not before he has sent something.
func (c *pipeConn) identify(h windows.Handle) error {
	var pid uint32
	if err := windows.GetNamedPipeClientProcessId(h, &pid); err != nil {
		pid = 0 // for the history only
	}
	answer := make(chan error, 1)
	go func() { answer <- c.impersonate(h) }()
	err := <-answer
	c.caller.PID = int(pid)
	return err
}

// impersonate reads the client's token. It wants a goroutine of its own: if the
// thread could not become itself again, it ends with the goroutine.
func (c *pipeConn) impersonate(h windows.Handle) error {
	runtime.LockOSThread()
	ok, _, err := impersonateNamedPipeClient.Call(uintptr(h))
	if ok == 0 {
		runtime.UnlockOSThread()
		return fmt.Errorf("cannot tell who has connected: %w", err)
	}
	var token windows.Token
	// As ourselves, not as the client: he need not have a right to his own token.
	tokenErr := windows.OpenThreadToken(windows.CurrentThread(), windows.TOKEN_QUERY, true, &token)
	if err := windows.RevertToSelf(); err != nil {
		if tokenErr == nil {
			token.Close()
		}
		return fmt.Errorf("cannot be ourselves again: %w", err)
	}
	runtime.UnlockOSThread()
	if tokenErr != nil {
		return fmt.Errorf("cannot tell who has connected: %w", tokenErr)
	}
	defer token.Close()
	c.caller, err = callerOf(token)
	return err
}

// callerOf is the owner of a token. SYSTEM and whoever acts as a member of
// Administrators are uid 0.
func callerOf(token windows.Token) (Caller, error) {
	u, err := token.GetTokenUser()
	if err != nil {
		return Caller{}, fmt.Errorf("cannot read who has connected: %w", err)
	}
	sid := u.User.Sid.String()
	if sid == "" {
		return Caller{}, fmt.Errorf("cannot read who has connected: no security identifier")
	}
	list, err := token.GetTokenGroups()
	if err != nil {
		return Caller{}, fmt.Errorf("cannot read the groups of who has connected: %w", err)
	}
	c := Caller{UID: SIDNumber(sid), GID: -1, SID: sid}
	root := u.User.Sid.IsWellKnown(windows.WinLocalSystemSid)
	var groups []string
	for _, g := range list.AllGroups() {
		// An administrator who has not elevated carries the group to be denied by it only.
		if g.Attributes&windows.SE_GROUP_ENABLED == 0 || g.Attributes&windows.SE_GROUP_USE_FOR_DENY_ONLY != 0 {
			continue
		}
		root = root || g.Sid.IsWellKnown(windows.WinBuiltinAdministratorsSid)
		groups = append(groups, g.Sid.String())
	}
	if root {
		c.UID = 0
	}
	c.groups = strings.Join(groups, " ")
	return c, nil
}

// peer is who is at the other end, as of the moment he connected. PID is for
// the history only.
func peer(c net.Conn) (Caller, error) {
	p, ok := c.(*pipeConn)
	if !ok || p.caller.SID == "" {
		return Caller{}, fmt.Errorf("a %T has no peer credentials", c)
	}
	return p.caller, nil
}

// identify adds the caller's name and whether he may change things: SYSTEM,
// who acts as an administrator, or a member of the group. Membership is that of
// his token: Windows fixes it when he logs on.
func identify(c Caller, group string) Caller {
	c.User = c.SID
	if sid, err := windows.StringToSid(c.SID); err == nil {
		if account, domain, _, err := sid.LookupAccount(""); err == nil && account != "" {
			c.User = account
			if domain != "" {
				c.User = domain + `\` + account
			}
		}
	}
	c.Admin = c.SID != "" && (c.UID == 0 || c.inGroup(group) || c.runsUs())
	return c
}

// inGroup tells whether the caller's token carries a group by that name.
func (c Caller) inGroup(name string) bool {
	if name == "" || c.groups == "" {
		return false
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return false
	}
	for _, sid := range strings.Fields(c.groups) {
		if sid == g.Gid {
			return true
		}
	}
	return false
}

// runsUs: who runs the daemon without being an administrator has its files and
// its memory anyway: an ordinary user who tries it on processes of his own.
func (c Caller) runsUs() bool {
	own, err := ownCaller()
	return err == nil && own.UID != 0 && own.SID == c.SID
}

func ownCaller() (Caller, error) { return callerOf(windows.GetCurrentProcessToken()) }
