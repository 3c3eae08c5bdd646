package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/eligibility"
	"hotpatchd/patcher/target"
	"hotpatchd/patcher/target/sim"
)

type command func(s *script, words []string) error

// commands is everything a script can say. What it expects is in
// scenario_expect_test.go, what happens on the machine in scenario_machine_test.go.
var commands map[string]command

func init() {
	commands = map[string]command{
		// The publisher.
		"publish":  (*script).doPublish, // ID PRODUCT SEQUENCE IMAGE… [feature= severity= cve= os= expires=]
		"rollout":  (*script).doRollout, // ID [percent= not-before= halt= undo= reason=]
		"withdraw": func(s *script, w []string) error { return s.withdraw(arg(w, 0)) },
		"repo":     (*script).doRepo,    // down | up
		"payload":  (*script).doPayload, // ID away | back
		"resign":   (*script).doResign,  // [expires=DURATION]

		// The machine.
		"run":    (*script).doRun,    // PID MODULE… [exe= user= uid= image= denied=true guard=]
		"exit":   (*script).doExit,   // PID [code=N] [signal=N]
		"exec":   (*script).doExec,   // PID MODULE…
		"fork":   (*script).doFork,   // PID LABEL
		"load":   (*script).doLoad,   // PID FILE [base= name=]
		"unload": (*script).doUnload, // PID NAME
		"thread": (*script).doThread, // PID THREAD WHERE
		"poke":   (*script).doPoke,   // PID MODULE!EXPORT HEX | kept
		"keep":   (*script).doKeep,   // PID MODULE!EXPORT
		"guard":  (*script).doGuard,  // PID [CODE TEXT]
		"deny":   (*script).doDeny,   // PID true|false
		"fault":  (*script).doFault,  // EFFECT [at= op= pid= times= bytes= module= thread= pc=]
		"mend":   func(s *script, _ []string) error { s.m.ClearFaults(); return nil },
		"follow": (*script).doFollow, // PID MODULE!EXPORT

		// The device and its daemon.
		"start":  func(s *script, _ []string) error { return s.start() },
		"stop":   func(s *script, _ []string) error { return s.stop() },
		"kill":   func(s *script, _ []string) error { return s.kill() },
		"reboot": (*script).doReboot,
		"clock":  (*script).doClock,  // DURATION forward
		"sleep":  (*script).doSleep,  // DURATION, all of the machine
		"disk":   (*script).doDisk,   // full | free
		"fact":   (*script).doFact,   // CHECK [VALUE]
		"policy": (*script).doPolicy, // SECTION | none
		"config": (*script).doConfig, // [products=] [images=]
		"hours":  (*script).doHours,  // open | closed: HOURS in policy.toml
		"delete": func(s *script, w []string) error { return os.Remove(filepath.Join(s.cfg.StateDir, arg(w, 0))) },
		"damage": (*script).doDamage, // FILE of the state folder [freelist]
		"pass":   (*script).doPass,   // one whole turn of the loop

		// The operator.
		"check":   (*script).doCheck,
		"install": (*script).doInstall, // [ID] | file=ID
		"rollback": order(func(ctx context.Context, c *control.Client, id string) (*control.Change, error) {
			return c.Rollback(ctx, control.RollbackRequest{ID: id}, nil)
		}),
		"hold": order(func(ctx context.Context, c *control.Client, id string) (*control.Change, error) {
			return c.Hold(ctx, id, "by the scenario")
		}),
		"release-hold": order(func(ctx context.Context, c *control.Client, id string) (*control.Change, error) {
			return c.ReleaseHold(ctx, id, "by the scenario")
		}),
		"pause":  order(func(ctx context.Context, c *control.Client, _ string) (*control.Change, error) { return c.Pause(ctx) }),
		"resume": order(func(ctx context.Context, c *control.Client, _ string) (*control.Change, error) { return c.Resume(ctx) }),

		// Expectations.
		"status":       (*script).wantStatus,   // KEY=VALUE…
		"image":        (*script).wantImage,    // PID NAME [KEY=VALUE…]
		"no-image":     (*script).wantNoImage,  // PID [NAME]
		"coverage":     (*script).wantCoverage, // COUNT=N…; counts that are not named are 0
		"runs":         (*script).wantRuns,     // PID MODULE!EXPORT[,EXPORT…] old|ID
		"walked":       (*script).wantWalked,   // PID MODULE!EXPORT NAME…
		"story":        (*script).wantStory,    // CODE [KEY=VALUE…]
		"no-story":     (*script).wantNoStory,
		"stands":       (*script).wantStands, // story|attention|check CODE FOR, to within an hour
		"attention":    (*script).wantAttention,
		"no-attention": (*script).wantNoAttention,
		"history":      (*script).wantHistory, // ACTION [KEY=VALUE…]
		"no-history":   (*script).wantNoHistory,
		"list":         (*script).wantList,   // ID [KEY=VALUE…]
		"change":       (*script).wantChange, // KEY=VALUE…
		"verify":       (*script).wantVerify, // ok | KEY=VALUE…
		"plan":         (*script).wantPlan,   // PID NAME [KEY=VALUE…]
		"error":        (*script).wantError,  // WORDS
	}
}

// arg is a word, "" if there are fewer.
func arg(words []string, n int) string {
	if n < len(words) {
		return words[n]
	}
	return ""
}

// ask gives a call to the daemon its bound.
func (s *script) ask(fn func(context.Context, *control.Client) error) error {
	if s.life == nil {
		return errors.New("the daemon does not run")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return fn(ctx, s.life.client)
}

// order is a command that changes things.
func order(fn func(context.Context, *control.Client, string) (*control.Change, error)) command {
	return func(s *script, words []string) error {
		return s.ask(func(ctx context.Context, c *control.Client) (err error) {
			s.change, err = fn(ctx, c, arg(words, 0))
			return err
		})
	}
}

func (s *script) doReboot([]string) error {
	if s.life != nil {
		return errors.New("stop or kill the daemon first")
	}
	s.boot += "+"
	return nil
}

func (s *script) doClock(words []string) error {
	d, err := time.ParseDuration(arg(words, 0))
	s.clock.Add(int64(d))
	return err
}

func (s *script) doSleep(words []string) error {
	d, err := time.ParseDuration(arg(words, 0))
	s.slept.Add(int64(d))
	s.clock.Add(int64(d))
	return err
}

func (s *script) doDisk(words []string) error {
	s.full.Store(arg(words, 0) == "full")
	return nil
}

// doFact changes what the device is; without a value the fact cannot be read.
func (s *script) doFact(words []string) error {
	f := eligibility.Fact{Known: len(words) > 1, Value: arg(words, 1), Source: "here"}
	if !f.Known {
		f.Problem = "access denied"
	}
	s.mu.Lock()
	defer s.mu.Unlock() // nobody reads the fact before the clock is moved
	s.facts[eligibility.ID(arg(words, 0))] = f
	if s.life != nil {
		s.clock.Add(int64(factsEvery)) // the device is looked at anew once an hour
	}
	return nil
}

func (s *script) doPolicy(words []string) error {
	if arg(words, 0) == "none" {
		return os.Remove(s.cfg.Policy.File)
	}
	text, ok := s.sections[arg(words, 0)]
	if !ok {
		return fmt.Errorf("there is no section %q", arg(words, 0))
	}
	s.write("policy.toml", text)
	return nil
}

func (s *script) doConfig(words []string) error {
	if s.life != nil {
		return errors.New("the configuration is read at the start")
	}
	_, opts, err := options(words, "products", "images")
	if v, ok := opts["products"]; ok {
		s.cfg.Repository.Products = []Glob{Glob(v)}
	}
	if v, ok := opts["images"]; ok {
		s.cfg.Repository.Images = []Glob{Glob(v)}
	}
	return err
}

// doDamage overwrites a file; or only the lists of free pages of a state file,
// which leaves all that it says readable.
func (s *script) doDamage(words []string) error {
	path := filepath.Join(s.cfg.StateDir, arg(words, 0))
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	page, freelist := os.Getpagesize(), arg(words, 1) == "freelist"
	for i := range b {
		switch at := i % page; {
		case !freelist:
			b[i] ^= 0x5a
		case at == 8 && b[i] == 0x10: // the flags of a page of bolt
			b[i] = 0x33
		}
	}
	return os.WriteFile(path, b, 0o600)
}

func (s *script) doPass([]string) error {
	if s.life == nil {
		return errors.New("the daemon does not run")
	}
	return s.pass()
}

func (s *script) doCheck([]string) error {
	return s.ask(func(ctx context.Context, c *control.Client) error {
		_, err := c.Check(ctx)
		return err
	})
}

// doInstall installs by id, or from the file that the repository has of it,
// with the metadata beside it.
func (s *script) doInstall(words []string) error {
	words, opts, err := options(words, "file")
	if err != nil {
		return err
	}
	r := control.InstallRequest{ID: arg(words, 0)}
	if id := opts["file"]; id != "" {
		if r.File, r.Metadata, err = s.carry(id); err != nil {
			return err
		}
	}
	return s.ask(func(ctx context.Context, c *control.Client) (err error) {
		s.change, err = c.Install(ctx, r, nil)
		return err
	})
}

// carry reads a release and all metadata, as a person carries them on a stick.
func (s *script) carry(id string) (file []byte, meta map[string][]byte, err error) {
	list, err := filepath.Glob(filepath.Join(s.path("repo"), "targets", "releases", "*."+id+".hotpatch"))
	if err != nil || len(list) != 1 {
		return nil, nil, fmt.Errorf("%d files of %s: %v", len(list), id, err)
	}
	if file, err = os.ReadFile(list[0]); err != nil {
		return nil, nil, err
	}
	meta = map[string][]byte{}
	names, err := os.ReadDir(filepath.Join(s.path("repo"), "metadata"))
	for _, n := range names {
		b, err := os.ReadFile(filepath.Join(s.path("repo"), "metadata", n.Name()))
		if err != nil {
			return nil, nil, err
		}
		meta[n.Name()] = b
	}
	return file, meta, err
}

// place takes MODULE!EXPORT apart.
func place(word string) (module, export string, err error) {
	module, export, ok := strings.Cut(word, "!")
	if !ok {
		return "", "", fmt.Errorf("%q is not MODULE!EXPORT", word)
	}
	return module, export, nil
}

func (s *script) doFollow(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	module, export, err := place(arg(words, 1))
	if err == nil {
		s.traces[arg(words, 0)+" "+arg(words, 1)] = s.follow(pid, module, export)
	}
	return err
}

func (s *script) doFault(words []string) error {
	words, opts, err := options(words, "at", "op", "pid", "times", "bytes", "module", "thread", "pc")
	if err != nil {
		return err
	}
	f := sim.Fault{Do: sim.Effect(arg(words, 0)), Op: sim.Op(opts["op"]), Module: opts["module"], At: 1}
	for key, to := range map[string]*int{"at": &f.At, "times": &f.Times, "bytes": &f.Bytes, "thread": &f.Thread} {
		if v, ok := opts[key]; ok {
			if *to, err = strconv.Atoi(v); err != nil {
				return err
			}
		}
	}
	if v, ok := opts["pid"]; ok {
		if f.PID, err = s.pid(v); err != nil {
			return err
		}
	}
	if v, ok := opts["pc"]; ok {
		text, err := offsets(v)
		if err != nil {
			return err
		}
		f.PC = text
	}
	s.m.FailAt(f.At, f)
	return nil
}

func (s *script) doPoke(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	module, export, err := place(arg(words, 1))
	if err != nil {
		return err
	}
	at, err := s.m.Export(pid, module, export)
	if err != nil {
		return err
	}
	b := s.kept
	if arg(words, 2) != "kept" {
		if b, err = hex.DecodeString(arg(words, 2)); err != nil {
			return err
		}
	}
	return s.m.Poke(pid, at, b)
}

// doKeep remembers the first bytes of an export, for "poke PID PLACE kept".
func (s *script) doKeep(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	module, export, err := place(arg(words, 1))
	if err != nil {
		return err
	}
	at, err := s.m.Export(pid, module, export)
	if err == nil {
		s.kept, err = s.m.Peek(pid, at, 16)
	}
	return err
}

func (s *script) doGuard(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	if len(words) == 1 {
		return s.m.SetGuards(pid)
	}
	return s.m.SetGuards(pid, target.Guard{Code: target.GuardCode(words[1]), Text: arg(words, 2)})
}

// doHours makes the policy's hours open or closed just now.
func (s *script) doHours(words []string) error {
	from := s.now().Add(6 * time.Hour)
	if arg(words, 0) == "open" {
		from = s.now().Add(-6 * time.Hour)
	}
	window := from.Format("15:04") + "-" + from.Add(12*time.Hour).Format("15:04")
	s.write("policy.toml", strings.ReplaceAll(s.sections["policy.toml"], "HOURS", window))
	return nil
}
