package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
)

// Where the state breaks under the running daemon, an order is refused and has
// no effect, and the daemon ends itself; the next one finds what is applied.
func TestBrokenStateEndsTheDaemon(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs a system that lets others cut and remove an open file")
	}
	t.Parallel()
	for name, damage := range map[string]func(dir string) error{
		"cut":            func(dir string) error { return os.Truncate(filepath.Join(dir, "state.db"), 8192) },
		"folder removed": os.RemoveAll,
		"garbled": func(dir string) error {
			f, err := os.OpenFile(filepath.Join(dir, "state.db"), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt(make([]byte, 8192), 0)
			return errors.Join(err, f.Close())
		},
	} {
		for who, order := range map[string]func(context.Context, *control.Client) error{
			"nobody": nil,
			"hold":   func(ctx context.Context, c *control.Client) error { _, err := c.Hold(ctx, "R1", ""); return err },
			"rollback": func(ctx context.Context, c *control.Client) error {
				_, err := c.Rollback(ctx, control.RollbackRequest{}, nil)
				return err
			},
			"pause": func(ctx context.Context, c *control.Client) error { _, err := c.Pause(ctx); return err },
		} {
			t.Run(name+", asked by "+who, func(t *testing.T) {
				t.Parallel()
				r := sweepRig(t, works()[1]) // patched by R1
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				must(t, damage(r.cfg.StateDir))
				if order == nil {
					r.life.agent.Wake()
				} else if err := order(ctx, r.life.client); err == nil {
					t.Error("the order was answered with success")
				}
				var err error
				select {
				case err = <-r.life.ran:
				case <-ctx.Done():
					t.Fatal("the daemon goes on")
				}
				if !errors.Is(err, store.ErrBroken) || !strings.Contains(err.Error(), "state.db") {
					t.Errorf("it ended with %v", err)
				}
				if runs, err := r.runsNow(); err != nil || runs != "R1" {
					t.Errorf("the process runs %s, %v", runs, err)
				}
				r.life.ran <- nil // for stop
				must(t, r.stop())
				must(t, r.start())
				want := "R1"
				if name == "folder removed" { // and with it the hold on R2
					want = "R2"
				}
				must(t, r.until(func() string { return said(r.agree(want)) }))
			})
		}
	}
}

// What the system said is in the text that a person sees, without addresses.
func TestFailureNamesItsCause(t *testing.T) {
	a := &Agent{o: Options{Now: time.Now}, log: zap.NewNop()}
	for _, c := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("alloc at 0x1234: %w", syscall.ENOMEM), "could not be done (" + syscall.ENOMEM.Error() + "); nothing was changed"},
		{&os.PathError{Op: "open", Path: "/proc/1/mem", Err: syscall.EMFILE}, "could not be done (" + syscall.EMFILE.Error() + "); nothing was changed"},
		{fmt.Errorf("%w: cannot write: %w", errState, syscall.ENOSPC), "the state cannot be written (" + syscall.ENOSPC.Error() + "): nothing is begun without it"},
		{fmt.Errorf("read: %w", context.DeadlineExceeded), "could not be done (it took too long); nothing was changed"},
		{errors.New("whatever at 0x1234"), "could not be done; nothing was changed"},
	} {
		if got := a.failed(Intent{Kind: DoApply, Offer: &repository.Offer{}, Proc: &Proc{}, Image: &ImageView{}}, c.err).try.Reason.Text; got != c.want {
			t.Errorf("%v: %q", c.err, got)
		}
	}
}

// What is no file, or has no end, is refused at once by every reader.
func TestReadersWaitForNobody(t *testing.T) {
	folder := t.TempDir()
	pipe, huge := filepath.Join(folder, "pipe"), filepath.Join(folder, "huge")
	must(t, os.WriteFile(huge, nil, 0o600))
	must(t, os.Truncate(huge, 3<<30))
	files := map[string]string{huge: "longer than", folder: "not a regular file"}
	switch info, err := os.Stat("/dev/zero"); {
	case runtime.GOOS == "windows":
		pipe = `\\.\pipe\` + filepath.Base(filepath.Dir(folder))
		l, err := control.Listen(pipe) // takes whoever comes, and says nothing
		must(t, err)
		defer l.Close()
		files[pipe], files[`\\.\NUL`] = "not a regular file", "not a regular file"
	case err == nil && info.Mode()&os.ModeCharDevice != 0:
		files["/dev/zero"] = "not a regular file"
		fallthrough
	default:
		if err := exec.Command("mkfifo", pipe).Run(); err != nil {
			needs(t, "mkfifo")
		}
		files[pipe] = "not a regular file"
	}
	for file, want := range files {
		for reader, read := range map[string]func() error{
			"config": func() error { _, err := LoadConfig(file); return err },
			"policy": func() error { _, err := LoadPolicy(file); return err },
			"root":   func() error { _, err := ReadRoot(file); return err },
		} {
			done := make(chan error, 1)
			go func() { done <- read() }()
			select {
			case err := <-done:
				if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), file) {
					t.Errorf("%s of %s: %v", reader, file, err)
				}
			case <-time.After(patience):
				t.Fatalf("%s of %s hangs", reader, file)
			}
		}
	}
}

func needs(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("HOTPATCH_TEST_ALL") == "1" {
		t.Fatal("needs " + what)
	}
	t.Skip("needs " + what)
}
