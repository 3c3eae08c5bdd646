package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// call runs the command line and returns what it said.
func call(args ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = dispatch(args, &o, &e)
	return code, o.String(), e.String()
}

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args     string
		code     int
		out, err string // parts
	}{
		{"", 2, "", "usage: hotpatchd COMMAND"},
		{"help", 0, "check-config --config FILE", ""},
		{"--help", 0, "service uninstall", ""},
		{"help run", 0, "work in the foreground", ""},
		{"help install", 0, "install and enable the service", ""},
		{"help service", 0, "uninstall stop and remove", ""},
		{"help service stop", 0, "what is applied stays", ""},
		{"help fly", 2, `there is no command "fly"`, ""},
		{"service -h", 0, "", "uninstall stop and remove"},
		{"version", 0, "hotpatchd ", ""},
		{"--version", 0, runtime.Version(), ""},
		{"version x", 2, "", `version takes no argument "x"`},
		{"fly", 2, "", `there is no command "fly"`},
		{"run --hepl", 2, "", "usage: hotpatchd run --config FILE"},
		{"run -h", 0, "", "usage: hotpatchd run --config FILE"},
		{"run --log xml", 2, "", `--log is json or console, not "xml"`},
		{"run --config", 2, "", "flag needs an argument"},
		{"service", 2, "", "usage: hotpatchd service install|"},
		{"service fly", 2, "", "there is no service fly"},
		{"service stop --print", 2, "", "flag provided but not defined"},
		{"start x", 2, "", `start takes no argument "x"`},
		{"run --config does/not/exist.toml", 1, "", "hint: write does/not/exist.toml; one line is enough"},
		{"check-config --config does/not/exist.toml", 1, "to do   write does/not/exist.toml; one line is enough to begin: format = \"hotpatchd-config/1\"", ""},
	} {
		code, out, errOut := call(strings.Fields(c.args)...)
		if code != c.code || !strings.Contains(out, c.out) || !strings.Contains(errOut, c.err) {
			t.Errorf("%q: exit %d\nout %s\nerr %s", c.args, code, out, errOut)
		}
		if c.out == "" && out != "" || c.err == "" && errOut != "" {
			t.Errorf("%q: something said where nothing should be\nout %s\nerr %s", c.args, out, errOut)
		}
	}
	if _, out, _ := call("help"); strings.Contains(out, "pe-host") {
		t.Error("pe-host is for tests and not shown")
	}
}

// configured writes a configuration with everything beside it.
func configured(t *testing.T, more string) (folder, path string) {
	t.Helper()
	folder = shortTempDir(t)
	path = filepath.Join(folder, "config.toml")
	text := "format = \"hotpatchd-config/1\"\nstate_dir = \"state\"\npolicy = { file = \"policy.toml\" }\n"
	socket := "c.sock"
	if runtime.GOOS == "windows" {
		socket = fmt.Sprintf(`\\.\pipe\%s-%d`, filepath.Base(folder), os.Getpid())
	}
	text += "control = { socket = '" + socket + "', group = \"\" }\n"
	put(t, path, text+more)
	return folder, path
}

// shortTempDir is one whose name leaves room for a socket's.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hpd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCheckConfig(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux: modes of files and Unix sockets")
	}
	const sim = "repository = { root = \"root.json\", url = \"URL\" }\nbackend = { name = \"sim\", scene = \"scene.toml\" }\neligibility = { facts = \"facts.toml\" }\n"
	scene := "format = \"hotpatchd-scene/1\"\n"
	facts := "format = \"hotpatchd-facts/1\"\n[os]\nvalue = \"Linux\"\n"
	policy := "format = \"hotpatchd-policy/1\"\nenrolled = true\n"
	for _, c := range []struct {
		name   string
		config string
		do     func(folder string)
		code   int
		want   []string
	}{
		{"no repository", strings.Replace(sim, "URL", "", 1), nil, 0, []string{
			"WELL    FOLDER/config.toml can be used.\n",
			"ok      policy      FOLDER/policy.toml\nnote    policy      allow_hotpatch is not set: the device gets no new fixes, until it says allow_hotpatch = true\n",
			"note    repository  none; and no FOLDER/root.json, so that no release can be verified at all\n",
			"ok      state       FOLDER/state does not exist yet, and can be made\n",
			"ok      control     FOLDER/c.sock; " + owners(runtime.GOOS) + " only may change things\n",
			"ok      facts       FOLDER/facts.toml\n",
			"ok      backend     sim: ",
		}},
		{"no root of trust", strings.Replace(sim, "URL", "https://patches.example.com", 1), nil, 1, []string{
			"WRONG   1 thing that FOLDER/config.toml names must be mended.\n",
			"wrong   repository  cannot read the root of trust: open FOLDER/root.json: no such file or directory\n",
		}},
		{"a root of trust that is none", strings.Replace(sim, "URL", "https://patches.example.com", 1),
			func(d string) { put(t, d+"/root.json", "{\"signed\":{}}") }, 1, []string{"wrong   repository  "}},
		{"no policy", strings.Replace(sim, "URL", "", 1), func(d string) { os.Remove(d + "/policy.toml") }, 0, []string{
			"note    policy      there is no FOLDER/policy.toml: the device is not enrolled\n"}},
		{"a wrong policy and a wrong scene", strings.Replace(sim, "URL", "", 1), func(d string) {
			put(t, d+"/policy.toml", policy+"mode = \"x\"\n")
			put(t, d+"/scene.toml", scene+"x = 1\n")
		}, 1, []string{
			"WRONG   2 things that FOLDER/config.toml names must be mended.\n",
			"wrong   policy      FOLDER/policy.toml:3:8: mode: \"x\" is none of \"automatic\", \"approved\", \"manual\"\n                      3 | mode = \"x\"\n",
			"wrong   backend     ",
		}},
		{"files that anybody writes", strings.Replace(sim, "URL", "", 1), func(d string) {
			os.Chmod(d+"/policy.toml", 0o666)
			os.Chmod(d+"/config.toml", 0o620)
		}, 1, []string{
			"wrong   config      FOLDER/config.toml may be written by others than its owner (mode -rw--w----): they would command the daemon; chmod go-w\n",
			"wrong   policy      FOLDER/policy.toml may be written by others than its owner",
		}},
		{"a state folder that is a file", strings.Replace(sim, "URL", "", 1), func(d string) { put(t, d+"/state", "") }, 1, []string{
			"wrong   state       cannot make the state folder: FOLDER/state is not a folder\n"}},
		{"a state folder that anybody writes", strings.Replace(sim, "URL", "", 1), func(d string) {
			os.Mkdir(d+"/state", 0o700)
			os.Chmod(d+"/state", 0o777)
		}, 1, []string{"wrong   state       cannot use FOLDER/state as the state folder: others may write to it (mode -rwxrwxrwx)\n"}},
		{"a state folder that leads nowhere", strings.Replace(sim, "URL", "", 1), func(d string) { os.Symlink(d+"/none", d+"/state") }, 1, []string{
			"wrong   state       cannot make the state folder: FOLDER/state is a symbolic link to FOLDER/none, which is not there\n"}},
		{"a state file that is none", strings.Replace(sim, "URL", "", 1), func(d string) { os.MkdirAll(d+"/state/state.db", 0o700) }, 1, []string{
			"wrong   state       cannot open state: FOLDER/state/state.db is not a regular file\n"}},
		{"a root of trust that never ends", strings.Replace(sim, "URL", "", 1), func(d string) { put(t, d+"/root.json", ""); os.Truncate(d+"/root.json", 3<<30) }, 1, []string{
			"wrong   repository  cannot read the root of trust: FOLDER/root.json is longer than 524288 bytes\n"}},
		{"facts that are none", strings.Replace(sim, "URL", "", 1), func(d string) { put(t, d+"/facts.toml", "x = 1\n") }, 1, []string{
			"wrong   facts       FOLDER/facts.toml: format is"}},
		{"a group that is not there", strings.Replace(sim, "URL", "", 1), func(d string) {
			b, _ := os.ReadFile(d + "/config.toml")
			put(t, d+"/config.toml", strings.Replace(string(b), `group = ""`, `group = "no-such-group"`, 1))
		}, 0, []string{"note    control     FOLDER/c.sock; there is no group no-such-group, so that " + owners(runtime.GOOS) + " only may change things\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			folder, path := configured(t, c.config)
			put(t, filepath.Join(folder, "scene.toml"), scene)
			put(t, filepath.Join(folder, "facts.toml"), facts)
			put(t, filepath.Join(folder, "policy.toml"), policy)
			if c.do != nil {
				c.do(folder)
			}
			before := names(t, folder)
			code, out, errOut := call("check-config", "--config", path)
			if code != c.code || errOut != "" {
				t.Errorf("exit %d, stderr %q", code, errOut)
			}
			for _, want := range c.want {
				if !strings.Contains(out, strings.ReplaceAll(want, "FOLDER", folder)) {
					t.Errorf("missing %q in\n%s", want, out)
				}
			}
			if after := names(t, folder); after != before {
				t.Errorf("left behind: %s, before %s", after, before)
			}
		})
	}
}

func TestRemoveTree(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tree")
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "a", "b", "c"), "x")
	put(t, filepath.Join(dir, "d"), "x")
	if err := removeTree(dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); err == nil {
		t.Error("it is still there")
	}
	if err := removeTree(dir); err == nil {
		t.Error("there was nothing to remove, and no word of it")
	}
}

func names(t *testing.T, folder string) string {
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	var s []string
	for _, e := range entries {
		s = append(s, e.Name())
	}
	return strings.Join(s, " ")
}

func TestLogFileIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hotpatchd.log")
	put(t, path, "old\n")
	l, err := openLog(path, 100)
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 29) + "\n")
	for range 10 {
		if n, err := l.Write(line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	l.Write(bytes.Repeat([]byte("y"), 150)) // longer than the limit: written whole, on its own
	l.Write(line)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	now, _ := os.ReadFile(path)
	before, _ := os.ReadFile(path + ".1")
	if !bytes.Equal(now, line) || len(before) != 150 {
		t.Errorf("%d bytes now, %d before", len(now), len(before))
	}
	// A first record over the limit pushes nothing aside.
	fresh := filepath.Join(t.TempDir(), "fresh.log")
	if l, err = openLog(fresh, 10); err != nil {
		t.Fatal(err)
	}
	l.Write(line)
	l.Close()
	if _, err := os.Stat(fresh + ".1"); err == nil {
		t.Error("an empty log was put aside")
	}
	if _, err := openLog(filepath.Join(path, "below", "a-file"), 100); err == nil {
		t.Error("opened below a file")
	}
}
