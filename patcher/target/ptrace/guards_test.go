//go:build linux && amd64

package ptrace

import (
	"context"
	"os"
	"strings"
	"testing"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

func TestGuards(t *testing.T) {
	b := newBackend(t)
	o := demo(t, hosttest.Options{Spin: 1, Sleep: 1})
	t.Run("seccomp", func(t *testing.T) {
		h := hosttest.Start(t, o)
		p := openHost(t, b, h)
		h.Do("seccomp") // after Open, which is what the guard cannot see
		at := free()
		refused(t, "Alloc", p.Alloc(at, page, target.Read), target.ErrDenied, "seccomp")
		if r, err := p.Regions(); err != nil || regionAt(r, at) != nil {
			t.Errorf("mapped all the same (%v)", err)
		}
		if i := openHost(t, b, h).Info(); !guarded(i, target.GuardSeccomp, "mode 2") {
			t.Errorf("guards %v", i.Guards)
		}
		h.Healthy()
	})
	t.Run("mdwe", func(t *testing.T) {
		h := hosttest.Start(t, o)
		p := openHost(t, b, h)
		h.Do("mdwe")
		works(t, p, h)
		at := free()
		must(t, "Alloc", p.Alloc(at, page, target.Read|target.Write))
		refused(t, "Protect", p.Protect(at, page, target.Read|target.Exec), target.ErrDenied)
		h.Healthy()
	})
	t.Run("syscall user dispatch", func(t *testing.T) {
		h := hosttest.Start(t, demo(t, hosttest.Options{}))
		p := openHost(t, b, h)
		h.Do("stop-leader") // the thread under dispatch is the only one then
		h.Do("dispatch")
		refused(t, "Alloc", p.Alloc(free(), page, target.Read), target.ErrDenied, "dispatch")
		if h.Value() != 42 {
			t.Error("wrong value")
		}
	})
	for _, how := range []string{"vfork", "clone-vm"} {
		t.Run(how, func(t *testing.T) {
			h := hosttest.Start(t, o)
			p := openHost(t, b, h)
			works(t, p, h)
			child := strings.TrimPrefix(h.Do(how), how+" ")
			_, err := p.Freeze(context.Background())
			refused(t, "Freeze", err, target.ErrBusy, "pid "+child)
			if i := openHost(t, b, h).Info(); !guarded(i, target.GuardShared, "pid "+child) {
				t.Errorf("guards %v", i.Guards)
			}
			h.Runs()
			h.Do("unshare")
			if i := openHost(t, b, h).Info(); len(i.Guards) != 0 {
				t.Errorf("guards %v", i.Guards)
			}
			works(t, p, h)
			h.Healthy()
		})
	}
	t.Run("ourselves and init", func(t *testing.T) {
		if i := infoOf(t, b, os.Getpid()); !guarded(i, target.GuardSelf) {
			t.Errorf("%+v", i)
		}
		if i := infoOf(t, b, 1); !guarded(i, target.GuardSystem) {
			t.Errorf("%+v", i)
		}
	})
	t.Run("no kernel threads", func(t *testing.T) {
		for range 2 * kernelRounds {
			l, err := b.List(context.Background())
			must(t, "List", err)
			for _, i := range l {
				if i.Exe == "" && !guarded(i, target.GuardProtected) {
					t.Errorf("%+v", i)
				}
			}
		}
	})
}
