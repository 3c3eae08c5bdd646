//go:build windows && (amd64 || arm64)

package win32

import (
	"context"
	"fmt"

	"golang.org/x/sys/windows"
)

// Probe tells what our token lets us do, and starts the guardian.
func (b *backend) Probe(context.Context) (string, error) {
	t := windows.GetCurrentProcessToken()
	who := "this user"
	if u, err := t.GetTokenUser(); err == nil {
		if account, domain, _, err := u.User.Sid.LookupAccount(""); err == nil {
			who = domain + `\` + account
		}
	}
	if b.method == suspension {
		if err := b.guard.ready(b.kernel); err != nil {
			return fmt.Sprintf("%s, but no guardian can be started, without which no thread is suspended", who), fmt.Errorf("cannot start a guardian: %w", err)
		}
	}
	if b.desc.privileged {
		return fmt.Sprintf("%s with SeDebugPrivilege, all processes that are not protected", who), nil
	}
	return fmt.Sprintf("only processes of %s: SeDebugPrivilege is missing", who), nil
}
