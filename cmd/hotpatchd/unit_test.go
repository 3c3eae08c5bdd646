package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"hotpatchd/agent"
)

func TestUnitText(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("needs slash paths: systemd is not for Windows")
	}
	text, err := unitText(`/opt/h p/100%"$x\/hotpatchd`, "/etc/hotpatchd/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	want := `ExecStart="/opt/h p/100%%\"$$x\\/hotpatchd" run --config "/etc/hotpatchd/config.toml"` + "\n"
	if !strings.Contains(text, want) {
		t.Errorf("no %s in\n%s", want, text)
	}
	for _, bad := range [][2]string{{"hotpatchd", "/c"}, {"/x", "c.toml"}, {"/x{{y}}", "/c"}, {"/x\ny", "/c"}} {
		if _, err := unitText(bad[0], bad[1]); err == nil {
			t.Errorf("accepted %q", bad)
		}
	}
}

// settings reads the [Service] section, keys that come twice joined.
func settings(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(key, "#") {
			m[key] += value
		}
	}
	return m
}

// What the daemon cannot work without, and what would blind it.
func TestUnitKeepsWhatTracingNeeds(t *testing.T) {
	m := settings(unitTemplate)
	for key, words := range map[string]string{
		"Type":                    "notify",
		"CapabilityBoundingSet":   "CAP_SYS_PTRACE CAP_NET_ADMIN CAP_DAC_OVERRIDE CAP_PERFMON",
		"SystemCallFilter":        "@debug kcmp process_vm_readv process_vm_writev",
		"RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
		"Restart":                 "on-failure",
		"Nice":                    "-10",  // or pauses grow with the load of the machine
		"RuntimeDirectoryMode":    "0755", // operators who are not root reach the socket in it
	} {
		for _, w := range strings.Fields(words) {
			if !strings.Contains(" "+m[key]+" ", " "+w+" ") {
				t.Errorf("%s=%s lacks %s", key, m[key], w)
			}
		}
	}
	for _, key := range []string{"PrivatePIDs", "PrivateUsers", "PrivateNetwork", "ProtectProc", "ProcSubset", "PrivateTmp", "ProtectHome", "User"} {
		if v, ok := m[key]; ok {
			t.Errorf("%s=%s hides what the daemon looks after", key, v)
		}
	}
}

// all is set where nothing may be skipped.
var all = os.Getenv("HOTPATCH_TEST_ALL") == "1"

func needs(t *testing.T, why string) {
	t.Helper()
	if all {
		t.Fatal("needs " + why)
	}
	t.Skip("needs " + why)
}

func TestSystemdAcceptsTheUnit(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux: systemd")
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		needs(t, "systemd-analyze (apt-get install systemd)")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	verify := func(text string) string {
		file := filepath.Join(t.TempDir(), "hotpatchd.service")
		put(t, file, text)
		out, err := exec.Command(analyze, "verify", "--man=no", file).CombinedOutput()
		if err != nil {
			return "failed: " + string(out)
		}
		return string(out)
	}
	text, err := unitText(exe, "/etc/hotpatchd/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	if got := verify(text); got != "" {
		t.Errorf("systemd-analyze says: %s", got)
	}
	// The check itself can fail.
	if got := verify(strings.Replace(text, "WatchdogSec", "WachdogSec", 1)); !strings.Contains(got, "WachdogSec") {
		t.Errorf("a misspelt key was accepted: %q", got)
	}
}

func TestFirstConfiguration(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "etc", "config.toml")
	var said strings.Builder
	i := installer{exe: "/usr/bin/hotpatchd", config: path, said: &said}
	for range 2 {
		if err := i.ensureConfig(); err != nil {
			t.Fatal(err)
		}
	}
	if want := "written  " + path + "\nkept     " + path + "\n"; said.String() != want {
		t.Errorf("said %q", said.String())
	}
	if code, out, _ := call("check-config", "--config", path); strings.Contains(out, "no such key") || strings.Contains(out, path+":") {
		t.Errorf("exit %d: the first configuration cannot be read:\n%s", code, out)
	}
	// Every key is shown with its default: all of them uncommented change nothing.
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	put(t, path, regexp.MustCompile(`(?m)^# ([a-z_]+ = )`).ReplaceAllString(string(b), "$1"))
	got, shown, err := agent.LoadManagedConfig(path, nil)
	if err != nil {
		t.Fatalf("with every key set: %v", err)
	}
	for _, x := range shown {
		if x.Source == "default" {
			t.Errorf("%s is not shown in the first configuration", x.Key)
		}
	}
	want := agent.DefaultConfig()
	if want.File = path; !reflect.DeepEqual(got, want) {
		t.Errorf("with every key set: %+v\nnot the defaults: %+v", got, want)
	}
	put(t, path, "mine")
	if err := i.ensureConfig(); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "mine" {
		t.Errorf("overwrote a configuration with %q", b)
	}
}

func TestNoSystemdIsSaid(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux: systemd")
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		t.Skip("needs a system that was not booted with systemd; here the real thing would be installed")
	}
	config := filepath.Join(t.TempDir(), "config.toml")
	for _, args := range [][]string{{"service", "install"}, {"install"}, {"service", "start"}, {"uninstall"}, {"stop"}, {"service", "restart"}} {
		code, out, errOut := call(append(args, "--config", config)...)
		if code != exitFailed || out != "" || !strings.Contains(errOut, "not booted with systemd") || !strings.Contains(errOut, "hint: write "+config+"; one line is enough") {
			t.Errorf("%v: exit %d, %q, %q", args, code, out, errOut)
		}
	}
	if _, err := os.Lstat(config); err == nil {
		t.Error("a configuration was written although nothing was installed")
	}
}
