//go:build linux && amd64

package ptrace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace/hosttest"
)

// mapped has a host map a file and returns where.
func mapped(t *testing.T, h *hosttest.Host, path string, args string) target.Addr {
	t.Helper()
	var at target.Addr
	if _, err := fmt.Sscanf(h.Do(fmt.Sprintf("map %s %x %s", path, farSize, args)), "map %x", &at); err != nil {
		t.Fatal(err)
	}
	return at
}

// Pages that a server would have to be asked for are not read, those that are
// there are, and everything else about such a process works.
func TestFarPages(t *testing.T) {
	file, _ := farFile(t, 1, 0)
	b := newBackend(t)
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Block: 1}))
	at := mapped(t, h, file, "")
	h.Do(fmt.Sprintf("touch %x", uint64(at)))
	p := openHost(t, b, h)
	got := make([]byte, page)
	if n, err := p.ReadAt(got, at); n != page || err != nil || !bytes.Equal(got, bytes.Repeat([]byte("a"), page)) {
		t.Errorf("the page that is there: %d, %v, %x", n, err, got[:8])
	}
	n, err := p.ReadAt(got, at+page-16)
	if n != 16 {
		t.Errorf("%d bytes before the page that is not there", n)
	}
	refused(t, "ReadAt", err, target.ErrUnsupported, file, "lies on fuse", "not in memory")
	_, err = p.WriteAt([]byte("x"), at+page)
	refused(t, "WriteAt", err, target.ErrUnsupported, file)
	if _, err := p.WriteAt([]byte("b"), at); err != nil {
		t.Errorf("WriteAt where a page is: %v", err)
	}
	if _, err := p.ReadAt(got[:2], at); err != nil || string(got[:2]) != "ba" {
		t.Errorf("after the write: %q, %v", got[:2], err)
	}
	works(t, p, h)
	h.Healthy()
}

// A process that maps such a file right after its mappings were listed does not
// hold us up for longer than the limit, nor anything else, and is left alone
// until the call that waits comes back.
func TestFarPagesMeanwhile(t *testing.T) {
	file, kill := farFile(t, 1, 0)
	b := newBackend(t)
	b.late.limit, b.late.rest = 200*time.Millisecond, time.Millisecond
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	other := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	p := openHost(t, b, h)
	_, err := p.Regions()
	must(t, "Regions", err)
	at := mapped(t, h, file, "")
	began := time.Now()
	_, err = p.ReadAt(make([]byte, page), at+page)
	refused(t, "ReadAt", err, target.ErrBusy, "no answer")
	if d := time.Since(began); d > hosttest.Patience {
		t.Errorf("it took %v", d)
	}
	_, err = p.Regions()
	refused(t, "Regions", err, target.ErrBusy, "not come back")
	_, err = p.Freeze(context.Background())
	refused(t, "Freeze", err, target.ErrBusy)
	refused(t, "Alloc", p.Alloc(free(), page, target.Read), target.ErrBusy)
	if i := infoOf(t, b, h.PID); i.ID != p.Info().ID {
		t.Errorf("it seems to be %v, was %v", i.ID, p.Info().ID)
	}
	works(t, openHost(t, b, other), other)
	h.Runs()
	p.Close()
	kill()
	until(t, "the call comes back", func() bool { return b.late.admit(p.life.lifetime()) == nil })
	again := openHost(t, b, h)
	works(t, again, h)
	if i := infoOf(t, b, h.PID); i.ID != p.Info().ID || len(i.Guards) != 0 {
		t.Errorf("afterwards: %+v", i)
	}
	h.Healthy()
}

// A program that maps such a file over what tells its life from others is
// listed, and asks for no wait.
func TestFarPagesOverStack(t *testing.T) {
	file, kill := farFile(t, 1, 0)
	b := newBackend(t)
	var env []string // pointers enough that no frame of the main thread lies on the page
	for n := range 2000 {
		env = append(env, fmt.Sprintf("V%d=", n))
	}
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1, Env: env}))
	t.Cleanup(kill)
	p := openHost(t, b, h)
	var random target.Addr
	if _, err := fmt.Sscanf(h.Do("auxv 25"), "auxv %x", &random); err != nil {
		t.Fatal(err)
	}
	const over = page // the file's second page is the one that does not come
	mapped(t, h, file, fmt.Sprintf("%x", uint64(random&^(page-1))-over))
	_, err := p.Freeze(context.Background())
	refused(t, "Freeze", err, target.ErrGone)
	i := infoOf(t, b, h.PID)
	q, err := b.Open(context.Background(), i.ID)
	must(t, "Open", err)
	q.Close()
	if len(b.late.late) != 0 {
		t.Error("it was waited for")
	}
	h.Runs()
}

// A thread that waits for a page may hold the lock of its address space: another
// one waits for that lock to change the mappings, and everybody after it.
func TestLockHeld(t *testing.T) {
	file, kill := farFile(t, 1, 1)
	b := newBackend(t)
	b.late.limit, b.late.rest = 200*time.Millisecond, time.Millisecond
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	t.Cleanup(kill) // before that of the host, which cannot end
	other := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	p := openHost(t, b, h)
	_, err := p.Regions()
	must(t, "Regions", err)
	at := mapped(t, h, file, "")
	h.Do(fmt.Sprintf("beside hold %x", uint64(at)+page))
	until(t, "the lock is held", func() bool {
		_, err := p.ReadAt(make([]byte, 8), target.Addr(h.Entry()))
		return errors.Is(err, target.ErrBusy)
	})
	_, err = b.Open(context.Background(), p.Info().ID)
	refused(t, "Open", err, target.ErrBusy)
	refused(t, "Alloc", p.Alloc(free(), page, target.Read), target.ErrBusy)
	if i := infoOf(t, b, h.PID); i.ID != p.Info().ID {
		t.Errorf("it seems to be %v, was %v", i.ID, p.Info().ID)
	}
	fresh := newBackend(t) // one that sees it for the first time
	fresh.late.limit = 200 * time.Millisecond
	if i := infoOf(t, fresh, h.PID); !guarded(i, target.GuardProtected, "no answer") {
		t.Errorf("the guards are %v", i.Guards)
	}
	works(t, openHost(t, b, other), other)
	kill()
	until(t, "the calls come back", func() bool { return b.late.admit(p.life.lifetime()) == nil })
}

func closeIf(p target.Process, err error) {
	if err == nil {
		p.Close()
	}
}

// A thread in the middle of an exec from such a file system makes whoever
// attaches wait as long.
func TestExecFromFar(t *testing.T) {
	file, kill := farFile(t, 0, 0)
	b := newBackend(t)
	b.late.rest = time.Millisecond
	h := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	t.Cleanup(kill)
	other := hosttest.Start(t, demo(t, hosttest.Options{Spin: 1}))
	h.Do("beside exec " + file)
	until(t, "it executes the file", func() bool {
		calls, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", h.PID))
		for _, f := range calls {
			if c, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(c), "59 ") {
				return true
			}
		}
		return false
	})
	p := openHost(t, b, h)
	_, err := p.Freeze(context.Background())
	refused(t, "Freeze", err, target.ErrBusy, "no answer")
	refused(t, "Alloc", p.Alloc(free(), page, target.Read), target.ErrBusy)
	h.Runs()
	works(t, openHost(t, b, other), other)
	kill()
	until(t, "the call comes back", func() bool { return b.late.admit(p.life.lifetime()) == nil })
	works(t, openHost(t, b, h), h)
	if n := tracedThreads(t, h.PID); n != 0 {
		t.Errorf("%d threads are still traced", n)
	}
	h.Healthy()
}

// A 32-bit program is told without a look at its file.
func TestThirtyTwoBit(t *testing.T) {
	elf := []byte("\x7fELF\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00" + // 32-bit
		"\x02\x00\x03\x00\x01\x00\x00\x00\x54\x80\x04\x08\x34\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x34\x00\x20\x00\x01\x00\x00\x00\x00\x00\x00\x00" +
		"\x01\x00\x00\x00\x00\x00\x00\x00\x00\x80\x04\x08\x00\x80\x04\x08\x5d\x00\x00\x00\x5d\x00\x00\x00\x05\x00\x00\x00\x00\x10\x00\x00" +
		"\xb8\x1d\x00\x00\x00\xcd\x80\xeb\xf7") // mov $29,%eax (pause); int $0x80; jmp
	path := filepath.Join(t.TempDir(), "small")
	must(t, "write", os.WriteFile(path, elf, 0o755))
	c := exec.Command(path)
	if err := c.Start(); err != nil {
		hosttest.Need(t, "32-bit programs: %v", err)
	}
	t.Cleanup(func() { c.Process.Kill(); c.Wait() })
	b := newBackend(t)
	until(t, "it runs its program", func() bool { return strings.HasSuffix(infoOf(t, b, c.Process.Pid).Exe, "/small") })
	if i := infoOf(t, b, c.Process.Pid); i.Arch != target.X86 || !guarded(i, target.Guard32Bit) {
		t.Errorf("%+v", i)
	}
	if i := infoOf(t, b, os.Getpid()); i.Arch != target.AMD64 || guarded(i, target.Guard32Bit) {
		t.Errorf("%+v", i)
	}
}
