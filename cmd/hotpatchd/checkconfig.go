package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"hotpatchd/agent"
	"hotpatchd/agent/repository"
	"hotpatchd/eligibility"
	"hotpatchd/eligibility/probe"
	"hotpatchd/patcher/target"
)

// probeWait bounds the backend's answer on what the system lets it do.
const probeWait = 10 * time.Second

// finding is one line of check-config.
type finding struct {
	word string // ok, note or wrong
	what string
	text string
}

func checkConfigCommand(c *command, args []string, out, errOut io.Writer) int {
	f := c.flags(errOut)
	path := f.String("config", agent.DefaultConfigPath(), "")
	if code, done := c.parse(f, args); done {
		return code
	}
	cfg, _, err := agent.LoadManagedConfig(*path, management())
	if err != nil {
		fmt.Fprintf(out, "WRONG   %v\n", err)
		if errors.Is(err, fs.ErrNotExist) {
			fmt.Fprintf(out, "to do   %s\n", writeConfig(*path))
		}
		return exitFailed
	}
	findings := check(cfg)
	wrong := 0
	for _, f := range findings {
		if f.word == "wrong" {
			wrong++
		}
	}
	code := exitFailed
	switch wrong {
	case 0:
		code = exitDone
		fmt.Fprintf(out, "WELL    %s can be used.\n\n", cfg.File)
	case 1:
		fmt.Fprintf(out, "WRONG   1 thing that %s names must be mended.\n\n", cfg.File)
	default:
		fmt.Fprintf(out, "WRONG   %d things that %s names must be mended.\n\n", wrong, cfg.File)
	}
	for _, f := range findings {
		fmt.Fprintf(out, "%-6s  %-11s %s\n", f.word, f.what, strings.ReplaceAll(f.text, "\n", "\n                    "))
	}
	return code
}

// checker collects what is found.
type checker struct{ found []finding }

func (c *checker) ok(what, format string, args ...any)    { c.add("ok", what, format, args...) }
func (c *checker) note(what, format string, args ...any)  { c.add("note", what, format, args...) }
func (c *checker) wrong(what, format string, args ...any) { c.add("wrong", what, format, args...) }

func (c *checker) add(word, what, format string, args ...any) {
	c.found = append(c.found, finding{word, what, fmt.Sprintf(format, args...)})
}

// check looks at everything the configuration names. It leaves nothing behind
// and asks no network.
func check(cfg *agent.Config) []finding {
	c := &checker{}
	c.owned("config", cfg.File)
	c.policy(cfg)
	c.repository(cfg)
	c.state(cfg)
	c.control(cfg)
	c.report(cfg)
	c.backend(cfg)
	return c.found
}

// owned notes that whoever may write to this file commands the daemon.
func (c *checker) owned(what, path string) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		c.wrong(what, "%v", err)
	case runtime.GOOS != "windows" && info.Mode().Perm()&0o022 != 0:
		c.wrong(what, "%s may be written by others than its owner (mode %v): they would command the daemon; chmod go-w", path, info.Mode().Perm())
	default:
		if err := inOurHands(path); err != nil {
			c.wrong(what, "%v", err)
			return
		}
		c.ok(what, "%s", path)
	}
}

// removeTree removes a folder with all that is in it, from the bottom up: it
// asks for no call that only some versions of Windows have.
func removeTree(dir string) error {
	var paths []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	for _, path := range slices.Backward(paths) {
		if e := os.Remove(path); e != nil && !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

func (c *checker) policy(cfg *agent.Config) {
	p, _, err := agent.LoadManagedPolicy(cfg.Policy.File, management())
	switch {
	case err != nil:
		c.wrong("policy", "%v", err)
	case p.Absent:
		c.note("policy", "there is no %s: the device is not enrolled", cfg.Policy.File)
	default:
		m := management()
		if _, err := os.Stat(cfg.Policy.File); m != nil && errors.Is(err, fs.ErrNotExist) {
			c.ok("policy", "%s; there is no %s", m.Source(), cfg.Policy.File)
		} else {
			c.owned("policy", cfg.Policy.File)
		}
		c.allowed("enrolled", eligibility.Managed, p.Enrolled, p.Waive)
		c.allowed("allow_hotpatch", eligibility.Permission, p.AllowHotpatch, p.Waive)
	}
}

// allowed notes that a sound policy does not let anything be applied. On Windows
// device management may say what the policy leaves open.
func (c *checker) allowed(key string, check eligibility.ID, word *bool, waived []string) {
	if slices.Contains(waived, string(check)) || word != nil && *word || word == nil && runtime.GOOS == "windows" {
		return
	}
	found := "is not set"
	if word != nil {
		found = "is false"
	}
	c.note("policy", "%s %s: the device gets no new fixes, until it says %s = true", key, found, key)
}

func (c *checker) repository(cfg *agent.Config) {
	r := cfg.Repository
	root, err := agent.ReadRoot(r.Root)
	if hands := inOurHands(r.Root); err == nil && hands != nil {
		err = hands
	}
	switch {
	case errors.Is(err, fs.ErrNotExist) && r.URL == "":
		c.note("repository", "none; and no %s, so that no release can be verified at all", r.Root)
		return
	case err != nil:
		c.wrong("repository", "cannot read the root of trust: %v", err)
		return
	}
	// The client itself judges root of trust, addresses and certificates.
	cache, err := os.MkdirTemp("", "hotpatchd-check-*")
	if err != nil {
		c.wrong("repository", "cannot check the root of trust: %v", err)
		return
	}
	defer removeTree(cache)
	address := r.URL
	if address == "" {
		address = "file:///"
	}
	_, err = repository.New(repository.Config{
		URL: address, Dir: filepath.Join(cache, "cache"), InitialRoot: root, Proxy: r.Proxy, CAFile: r.CAFile, ClientCert: r.ClientCert,
	})
	switch {
	case err != nil:
		c.wrong("repository", "%v", err)
	case r.URL == "":
		c.note("repository", "none: releases come as files, verified to %s", r.Root)
	default:
		c.ok("repository", "%s; %s is a root of trust. Nothing was fetched: hotpatch check does that", r.URL, r.Root)
	}
}

func (c *checker) report(cfg *agent.Config) {
	if err := cfg.Report.Check(); err != nil {
		c.wrong("report", "%v", err)
	} else if cfg.Report.URL != "" {
		c.ok("report", "%s, every %s. Nothing was sent", cfg.Report.URL, cfg.Report.Every)
	}
}

// state proves that the state folder can be written, or could be made.
func (c *checker) state(cfg *agent.Config) {
	if err := cfg.CheckState(); err != nil {
		c.wrong("state", "%v", err)
		return
	}
	dir, missing := cfg.StateDir, ""
	for {
		info, err := os.Stat(dir)
		if err == nil && !info.IsDir() {
			c.wrong("state", "%s is not a folder", dir)
			return
		}
		if err == nil {
			break
		}
		if _, lerr := os.Lstat(dir); lerr == nil && errors.Is(err, fs.ErrNotExist) {
			c.wrong("state", "%s is a symbolic link to what is not there", dir)
			return
		}
		if !errors.Is(err, fs.ErrNotExist) || filepath.Dir(dir) == dir {
			c.wrong("state", "%v", err)
			return
		}
		if missing == "" {
			missing = dir
		}
		dir = filepath.Dir(dir)
	}
	f, err := os.CreateTemp(dir, ".hotpatchd-check-*")
	if err != nil {
		c.wrong("state", "cannot write to %s: %v", dir, err)
		return
	}
	f.Close()
	os.Remove(f.Name())
	if missing != "" {
		c.ok("state", "%s does not exist yet, and can be made", missing)
		return
	}
	c.ok("state", "%s can be written", dir)
}

func (c *checker) control(cfg *agent.Config) {
	group, owner := cfg.Control.Group, owners(runtime.GOOS)
	if group == "" {
		c.ok("control", "%s; %s only may change things", cfg.Control.Socket, owner)
		return
	}
	if _, err := user.LookupGroup(group); err != nil {
		c.note("control", "%s; there is no group %s, so that %s only may change things", cfg.Control.Socket, group, owner)
		return
	}
	c.ok("control", "%s; %s and group %s may change things", cfg.Control.Socket, owner, group)
}

// owners are those who may change things without being in any group of ours.
func owners(goos string) string {
	if goos == "windows" {
		return "the system and Administrators"
	}
	return "root"
}

func (c *checker) backend(cfg *agent.Config) {
	if file := cfg.Eligibility.Facts; file != "" {
		if _, err := probe.Simulated(file); err != nil {
			c.wrong("facts", "%v", err)
		} else {
			c.ok("facts", "%s", file)
		}
	}
	backend, err := openBackend(cfg)
	if err != nil {
		c.wrong("backend", "%v", err)
		return
	}
	if closer, ok := backend.(io.Closer); ok {
		defer closer.Close()
	}
	prober, ok := backend.(target.Prober)
	if !ok {
		c.ok("backend", "%s", backend.Name())
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), probeWait)
	defer cancel()
	sentence, err := prober.Probe(ctx)
	if err != nil {
		c.wrong("backend", "%s: %v", backend.Name(), err)
		return
	}
	c.ok("backend", "%s: %s", backend.Name(), sentence)
}
