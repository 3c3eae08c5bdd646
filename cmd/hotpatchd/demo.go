package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/ptrace"
	"hotpatchd/testdata/fixtures/demo"
)

// The answers of the demonstration's image before and after the fix.
const (
	wrongAnswer = 42
	rightAnswer = 43
)

const (
	// demoPatience bounds each wait of the demonstration: generous, because the
	// machine may be busy with anything else.
	demoPatience = 30 * time.Second
	// demoPoll is how often a wait looks.
	demoPoll = 20 * time.Millisecond
	demoID   = "DEMO-1"
)

// stage is where the story plays: real processes, or a simulated machine.
type stage interface {
	config(d *story) (backend string) // lines of the [backend] and [eligibility] tables
	start() (pid int, err error)      // one more process that hosts the image
	answers(pid int) (int, error)     // what its function answers now
	calls(pid int) (n, wrong uint64, err error)
	daemon(config string) error // starts the daemon
	kill() error                // ends it as SIGKILL does
	operator(socket string) operator
	close()
}

// operator is what the story asks of the daemon: *control.Client, or the
// service itself where this system has no control socket yet.
type operator interface {
	Status(ctx context.Context) (*control.Status, error)
	Eligibility(ctx context.Context) (*control.Eligibility, error)
	Offers(ctx context.Context) (*control.Offers, error)
	Processes(ctx context.Context, q control.ProcessQuery) (*control.Processes, error)
	Check(ctx context.Context) (*control.Status, error)
	Plan(ctx context.Context, q control.PlanQuery) (*control.Plan, error)
	Install(ctx context.Context, r control.InstallRequest, progress func(control.Event)) (*control.Change, error)
	Rollback(ctx context.Context, r control.RollbackRequest, progress func(control.Event)) (*control.Change, error)
	Verify(ctx context.Context) (*control.Verify, error)
	Close()
}

// story is the demonstration: each claim is asserted, the first false one ends it.
type story struct {
	stage  stage
	out    io.Writer
	dir    string
	client operator
	pids   []int
	// unheard: nobody reads what is printed any more.
	unheard error
}

func demoCommand(c *command, args []string, out, errOut io.Writer) int {
	f := c.flags(errOut)
	backend := f.String("backend", "", "")
	if code, done := c.parse(f, args); done {
		return code
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	signal.Ignore(syscall.SIGPIPE) // a reader that goes away must not keep us from cleaning up
	s, why, err := chooseStage(*backend)
	if err != nil {
		fmt.Fprintln(errOut, "hotpatchd: "+err.Error())
		return exitUsage
	}
	if why != "" {
		fmt.Fprintf(out, "SIMULATED        %s: the same story on a simulated machine, nothing real is touched\n\n", why)
	}
	if err := tell(ctx, s, out); err != nil {
		if _, unheard := fmt.Fprintf(out, "\nFAILED           %v\n", err); unheard != nil {
			return failed(errOut, err)
		}
		return exitFailed
	}
	return exitDone
}

// chooseStage takes real processes where they can be traced. why is the
// sentence that says why not.
func chooseStage(backend string) (s stage, why string, err error) {
	switch backend {
	case "sim":
		return newSimStage(), "as asked", nil
	case "", "ptrace":
	default:
		return nil, "", fmt.Errorf("--backend is sim or ptrace, not %q", backend)
	}
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		why = fmt.Sprintf("this is %s/%s, the real story needs linux/amd64", runtime.GOOS, runtime.GOARCH)
	} else if b, e := ptrace.New(); e != nil {
		why = e.Error()
	} else if p, ok := b.(target.Prober); ok {
		ctx, cancel := context.WithTimeout(context.Background(), demoPatience)
		defer cancel()
		if _, e := p.Probe(ctx); e != nil {
			why = e.Error()
		}
	}
	if why == "" {
		release, err := alone()
		if err != nil {
			return nil, "", err
		}
		return &realStage{release: release}, "", nil
	}
	if backend == "ptrace" {
		return nil, "", errors.New(why)
	}
	return newSimStage(), why, nil
}

// tell runs the story in a folder of its own and leaves nothing behind.
func tell(ctx context.Context, s stage, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "hotpatchd-demo-")
	if err != nil {
		s.close()
		return fmt.Errorf("cannot make a folder for the demonstration: %w; it is made where TMPDIR says", err)
	}
	d := &story{stage: s, out: out, dir: dir}
	defer func() {
		s.close()
		if d.client != nil {
			d.client.Close()
		}
		if rerr := removeTree(dir); err == nil {
			err = rerr
		}
	}()
	for _, part := range []func(context.Context) error{d.prepare, d.eligible, d.before, d.release, d.patched, d.later, d.killed, d.rolledBack} {
		if err := ctx.Err(); err != nil {
			return errors.New("interrupted")
		}
		if err := part(ctx); err != nil {
			return err
		}
		if d.unheard != nil {
			return fmt.Errorf("cannot print: %w", d.unheard)
		}
	}
	return nil
}

func (d *story) say(what, format string, a ...any) {
	if _, err := fmt.Fprintf(d.out, "%-16s %s\n", what, fmt.Sprintf(format, a...)); err != nil {
		d.unheard = err
	}
}

func (d *story) path(name string) string { return filepath.Join(d.dir, name) }

// prepare starts two vulnerable processes, makes keys and a repository with the
// fix, and starts the daemon, which is to wait for the operator's word.
func (d *story) prepare(ctx context.Context) error {
	for range 2 {
		pid, err := d.stage.start()
		if err != nil {
			return err
		}
		d.pids = append(d.pids, pid)
	}
	if _, err := repository.GenerateKeys(d.path("keys")); err != nil {
		return err
	}
	keys, err := repository.LoadKeys(d.path("keys"))
	if err != nil {
		return err
	}
	container, err := d.container()
	if err != nil {
		return err
	}
	if _, err := repository.Publish(d.path("repo"), keys, [][]byte{container}, repository.PublishOptions{Now: time.Now()}); err != nil {
		return err
	}
	// Mode manual, so that the plan can be seen before anything is changed.
	policy := "format = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = true\nmode = \"manual\"\n"
	if err := os.WriteFile(d.path("policy.toml"), []byte(policy), 0o600); err != nil {
		return err
	}
	config := fmt.Sprintf("format = \"hotpatchd-config/1\"\nstate_dir = %q\n[control]\nsocket = %q\n[repository]\nurl = %q\nroot = %q\ncheck_every = \"1h\"\nproducts = [\"demo\"]\nimages = [\"demo.dll\"]\n[policy]\nfile = %q\n%s",
		d.path("state"), d.socket(), folderURL(d.path("repo")), d.path("repo/root.json"), d.path("policy.toml"), d.stage.config(d))
	if err := os.WriteFile(d.path("config.toml"), []byte(config), 0o600); err != nil {
		return err
	}
	if err := d.stage.daemon(d.path("config.toml")); err != nil {
		return err
	}
	d.client = d.stage.operator(d.socket())
	return d.until(ctx, "the daemon answers", func() (bool, error) {
		st, err := d.client.Status(ctx)
		return err == nil && st.State != control.Unknown, nil
	})
}

// socket is where the daemon listens: on Windows a pipe, which lies in no folder.
func (d *story) socket() string {
	if runtime.GOOS == "windows" {
		return `\\.\pipe\` + filepath.Base(d.dir)
	}
	return d.path("control.sock")
}

// folderURL is a folder as a configuration names it: file:///C:/… on Windows.
func folderURL(dir string) string {
	return "file:///" + strings.TrimPrefix(filepath.ToSlash(dir), "/")
}

// until waits for a condition; an error of ok ends the wait at once.
func (d *story) until(ctx context.Context, what string, ok func() (bool, error)) error {
	for end := time.Now().Add(demoPatience); ; {
		done, err := ok()
		if err != nil || done {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("waited %s in vain until %s%s", demoPatience, what, d.logTail())
		}
		select {
		case <-ctx.Done():
			return errors.New("interrupted")
		case <-time.After(demoPoll):
		}
	}
}

// logTail is the end of the daemon's log, for a story that failed.
func (d *story) logTail() string {
	b, err := os.ReadFile(d.path("daemon.log"))
	if err != nil {
		return ""
	}
	const most = 2000
	return "; the daemon's last words:\n" + string(b[max(0, len(b)-most):])
}

func (d *story) eligible(ctx context.Context) error {
	e, err := d.client.Eligibility(ctx)
	if err != nil {
		return err
	}
	if !e.Eligible {
		for _, c := range e.Checks {
			d.say(string(c.Result), "%s: wanted %s, found %s", c.ID, c.Wanted, c.Found)
		}
		return errors.New("this device is not eligible")
	}
	d.say("eligible", "all checks, one by one:")
	for _, c := range e.Checks {
		d.say("", "%-9s %-14s %s", c.ID, c.Result, c.Found)
	}
	return nil
}

// all asserts what every process answers.
func (d *story) all(want int) error {
	for _, pid := range d.pids {
		got, err := d.stage.answers(pid)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("process %d answers %d, not %d", pid, got, want)
		}
	}
	return nil
}

func (d *story) before(context.Context) error {
	if err := d.all(wrongAnswer); err != nil {
		return err
	}
	d.say("before", "two processes, %d and %d, give the wrong answer, %d", d.pids[0], d.pids[1], wrongAnswer)
	return nil
}

// release has the daemon fetch and verify the fix, and plan.
func (d *story) release(ctx context.Context) error {
	if _, err := d.client.Check(ctx); err != nil {
		return fmt.Errorf("cannot check the repository: %w", err)
	}
	offers, err := d.client.Offers(ctx)
	if err != nil {
		return err
	}
	if len(offers.Releases) != 1 || offers.Releases[0].ID != demoID {
		return fmt.Errorf("the repository offers %d releases, not %s", len(offers.Releases), demoID)
	}
	d.say("release", "%s: fetched; signature, hash and freshness verified to the root of trust", demoID)
	plan, err := d.client.Plan(ctx, control.PlanQuery{ID: demoID, PID: d.pids[0]})
	if err != nil {
		return fmt.Errorf("cannot plan: %w", err)
	}
	if len(plan.Processes) != 1 || len(plan.Processes[0].Images) != 1 || plan.Processes[0].Images[0].Refused != nil {
		return fmt.Errorf("the plan for process %d is not what it should be%s", d.pids[0], d.logTail())
	}
	im := plan.Processes[0].Images[0]
	d.say("plan", "for process %d, %s at %s; nothing is changed by looking", d.pids[0], im.Name, im.Base)
	for _, s := range im.Sites {
		d.say("", "%s  %-11s %-22s ->  %-11s %s", s.Address, s.OldBytes, strings.Join(s.OldText, "; "), s.NewBytes, strings.Join(s.NewText, "; "))
	}
	return d.all(wrongAnswer)
}

// container makes the release from the images in the program.
func (d *story) container() ([]byte, error) {
	text := `format = "hotpatch-release/1"
id = "` + demoID + `"
product = "demo"
kind = "hotpatch"
sequence = 1
title = "the demonstration's wrong answer"
severity = "low"
[[images]]
name = "demo.dll"
file = "demo-1.dll"
`
	for name, b := range map[string][]byte{"demo-1.dll": demo.Patch, "demo-1.dll" + release.BaseSuffix: demo.Base} {
		if err := os.WriteFile(d.path(name), b, 0o600); err != nil {
			return nil, err
		}
	}
	m, files, err := release.FromTOML([]byte(text), os.DirFS(d.dir))
	if err != nil {
		return nil, err
	}
	return release.Write(m, files)
}

func (d *story) patched(ctx context.Context) error {
	if _, err := d.client.Install(ctx, control.InstallRequest{ID: demoID}, nil); err != nil {
		return fmt.Errorf("cannot install: %w", err)
	}
	if err := d.settled(ctx); err != nil {
		return err
	}
	// A host tells the value of its last call: wait for one after the swap.
	if err := d.until(ctx, "both processes answer right", func() (bool, error) { return d.all(rightAnswer) == nil, nil }); err != nil {
		return err
	}
	list, err := d.client.Processes(ctx, control.ProcessQuery{})
	if err != nil {
		return err
	}
	var pauses []string
	for _, p := range list.Processes {
		if !slices.Contains(d.pids, p.PID) {
			continue
		}
		pauses = append(pauses, fmt.Sprintf("%d in %d us", p.PID, p.Images[0].PauseUS))
	}
	d.say("patched", "while running: %s; both answer %d, %s", strings.Join(pauses, ", "), rightAnswer, d.lost())
	return d.noneWrong()
}

// settled waits until all processes of the story are patched.
func (d *story) settled(ctx context.Context) error {
	return d.until(ctx, fmt.Sprintf("%d processes are patched", len(d.pids)), func() (bool, error) {
		return d.in(ctx, control.Patched) == len(d.pids), nil
	})
}

// in counts the story's own processes whose image is in a state. Others may
// host the image too: another demonstration, say.
func (d *story) in(ctx context.Context, state control.ImageState) int {
	list, err := d.client.Processes(ctx, control.ProcessQuery{})
	if err != nil {
		return 0
	}
	n := 0
	for _, p := range list.Processes {
		if slices.Contains(d.pids, p.PID) && len(p.Images) == 1 && p.Images[0].State == state {
			n++
		}
	}
	return n
}

// lost tells how many calls were made, all of which gave one of the two answers.
func (d *story) lost() string {
	total := uint64(0)
	for _, pid := range d.pids {
		n, _, err := d.stage.calls(pid)
		if err == nil {
			total += n
		}
	}
	if total == 0 {
		return "no wrong value"
	}
	return fmt.Sprintf("%d calls so far, none lost and none with another value", total)
}

func (d *story) noneWrong() error {
	for _, pid := range d.pids {
		_, wrong, err := d.stage.calls(pid)
		if err != nil {
			return err
		}
		if wrong != 0 {
			return fmt.Errorf("process %d had %d wrong values", pid, wrong)
		}
	}
	return nil
}

func (d *story) later(ctx context.Context) error {
	began := time.Now()
	pid, err := d.stage.start()
	if err != nil {
		return err
	}
	d.pids = append(d.pids, pid)
	if err := d.settled(ctx); err != nil {
		return err
	}
	if err := d.until(ctx, "the later process answers right", func() (bool, error) {
		v, err := d.stage.answers(pid)
		return v == rightAnswer, err
	}); err != nil {
		return err
	}
	d.say("started later", "%d was patched by itself within %d ms of its start", pid, time.Since(began).Milliseconds())
	return d.noneWrong()
}

func (d *story) killed(ctx context.Context) error {
	if err := d.stage.kill(); err != nil {
		return err
	}
	if err := d.all(rightAnswer); err != nil {
		return fmt.Errorf("after the daemon was killed: %w", err)
	}
	if err := d.stage.daemon(d.path("config.toml")); err != nil {
		return err
	}
	if err := d.settled(ctx); err != nil {
		return err
	}
	v, err := d.client.Verify(ctx)
	if err != nil {
		return err
	}
	if !v.OK || v.Images < len(d.pids) {
		return fmt.Errorf("after the restart %d images are on record, %d sites differ", v.Images, len(v.Mismatches))
	}
	d.say("daemon killed", "by SIGKILL: all three still answered %d; started again, %d records agree with memory", rightAnswer, v.Images)
	return d.noneWrong()
}

func (d *story) rolledBack(ctx context.Context) error {
	if _, err := d.client.Rollback(ctx, control.RollbackRequest{}, nil); err != nil {
		return fmt.Errorf("cannot roll back: %w", err)
	}
	if err := d.until(ctx, "nothing is patched any more", func() (bool, error) {
		st, err := d.client.Status(ctx)
		return err == nil && st.State == control.Held && d.in(ctx, control.Unpatched) == len(d.pids), nil
	}); err != nil {
		return err
	}
	if err := d.until(ctx, "the old answer is back", func() (bool, error) { return d.all(wrongAnswer) == nil, nil }); err != nil {
		return err
	}
	if err := d.noneWrong(); err != nil {
		return err
	}
	d.say("rolled back", "all three answer %d again; %s", wrongAnswer, d.lost())
	return nil
}
