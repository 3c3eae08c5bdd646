//go:build linux && amd64

package ptrace

import (
	"bytes"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// describer turns what /proc shows of a process into an Info. What it keeps is
// about the machine, never about a process. Not safe for concurrent use.
type describer struct {
	late   *patience
	users  map[int]string
	self   int
	rights rights
	buf    []byte
}

// limits of what is read of one process.
const (
	statusLimit  = 8 << 10
	cmdlineLimit = 4 << 10
	cgroupLimit  = 8 << 10
)

// neverTouch are the programs on which a machine stands or falls, and those
// that watch over it and would take us for an intruder. Prefixes end in '*'.
var neverTouch = []string{
	"init", "systemd", "systemd-*", "dbus-daemon", "dbus-broker", "dbus-broker-lau", "udevd", "elogind", "runit", "s6-*",
	"auditd", "falcon-sensor*", "wdavdaemon*", "mdatp*", "clamd", "freshclam", "osqueryd", "wazuh-*", "ossec-*", "sentineld", "s1-agent", "cbagentd", "elastic-endpoin*", "falco",
}

// emulators run code of another architecture in a process of ours (user mode).
var emulators = []string{"qemu-aarch64*", "qemu-arm*", "qemu-i386*", "qemu-x86_64*", "qemu-riscv*", "qemu-ppc*", "qemu-s390x*", "qemu-mips*", "FEXInterpreter", "FEXLoader", "box64", "box86"}

// describe fills everything but ID and Change. It is as good as our rights: a
// process that may not be looked into has the guard "protected".
func (d *describer) describe(dir procDir, l *life) target.Info {
	i := target.Info{ID: l.id, UID: -1, Arch: target.AMD64}
	sub := l.sub
	status, err := dir.read(sub+"status", d.buf, statusLimit)
	if err == nil {
		d.buf = status
		i.UID = firstNumber(statusField(status, "Uid"))
	}
	i.Host = statusField(status, "Name")
	i.User = d.user(i.UID)
	i.Guards = d.statusGuards(status)
	i.Unit = unit(dir, sub)
	exe, err := dir.link(sub + "exe")
	if err == nil {
		i.Exe = strings.TrimSuffix(exe, " (deleted)")
		i.Host = filepath.Base(i.Exe)
		// The file itself is not opened: its file system may not answer.
		if l.x86 {
			i.Arch, i.Guards = target.X86, append(i.Guards, target.Guard{Code: target.Guard32Bit, Text: "a 32-bit program"})
		}
	} else if err == unix.EACCES || err == unix.EPERM {
		why := "CAP_SYS_PTRACE is missing"
		if d.rights.capable {
			why = "a security module or a user namespace"
		}
		i.Guards = append(i.Guards, target.Guard{Code: target.GuardProtected,
			Text: fmt.Sprintf("the system keeps us, uid %d, out of a process of %s: %s", d.rights.uid, i.User, why)})
	}
	if g, ok := d.rights.guard(); ok {
		i.Guards = append(i.Guards, g)
	}
	comm := statusField(status, "Name")
	if strings.HasPrefix(i.Host, "wine") {
		i.Image = d.wineImage(dir, l)
	}
	switch {
	case i.PID == d.self:
		i.Guards = append(i.Guards, target.Guard{Code: target.GuardSelf, Text: "this is the daemon itself"})
	case i.PID == 1:
		i.Guards = append(i.Guards, target.Guard{Code: target.GuardSystem, Text: "process 1 (" + comm + ") is never touched"})
	case i.Image == "" && (matches(neverTouch, comm) || matches(neverTouch, i.Host)):
		i.Guards = append(i.Guards, target.Guard{Code: target.GuardSystem, Text: comm + " is never touched"})
	}
	if matches(emulators, i.Host) {
		i.Guards = append(i.Guards, target.Guard{Code: target.GuardEmulated, Text: i.Host + " runs code of another architecture"})
	}
	return i
}

// statusGuards are those that /proc/PID/status shows.
func (d *describer) statusGuards(status []byte) []target.Guard {
	var g []target.Guard
	if pid := firstNumber(statusField(status, "TracerPid")); pid > 0 && !ours(pid) {
		g = append(g, target.Guard{Code: target.GuardTracer, Text: "traced by " + processName(pid)})
	}
	if mode := firstNumber(statusField(status, "Seccomp")); mode > 0 {
		text := fmt.Sprintf("seccomp mode %d", mode)
		if n := statusField(status, "Seccomp_filters"); n != "" {
			text += ", filters: " + n
		}
		g = append(g, target.Guard{Code: target.GuardSeccomp, Text: text})
	}
	return g
}

// ours tells whether a thread is one of our own: a tracer is named by its thread.
func ours(tid int) bool { return unix.Tgkill(unix.Getpid(), tid, 0) == nil }

// processName is "strace, pid 31211", or the pid alone.
func processName(pid int) string {
	comm, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	if err != nil {
		return "pid " + strconv.Itoa(pid)
	}
	return string(bytes.TrimSpace(comm)) + ", pid " + strconv.Itoa(pid)
}

func (d *describer) user(uid int) string {
	if uid < 0 {
		return ""
	}
	name, ok := d.users[uid]
	if !ok {
		name = strconv.Itoa(uid)
		if u, err := user.LookupId(name); err == nil {
			name = u.Username
		}
		d.users[uid] = name
	}
	return name
}

// wineImage is the Windows program of a Wine process: Wine puts its path at the
// start of the command line.
func (d *describer) wineImage(dir procDir, l *life) string {
	b, err := d.late.read(l.lifetime(), dir, l.sub+"cmdline", cmdlineLimit)
	if err != nil {
		return ""
	}
	for n := 0; n < 3 && len(b) > 0; n++ {
		arg := b
		if i := bytes.IndexByte(b, 0); i >= 0 {
			arg, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		s := string(arg)
		if strings.Contains(s, `:\`) || strings.HasSuffix(strings.ToLower(s), ".exe") {
			return s
		}
	}
	return ""
}

// unit is the systemd unit or the container of a process, from the path of its
// control group.
func unit(dir procDir, sub string) string {
	b, err := dir.read(sub+"cgroup", nil, cgroupLimit)
	if err != nil {
		return ""
	}
	best := ""
	for _, line := range strings.Split(string(b), "\n") {
		_, rest, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		controllers, path, _ := strings.Cut(rest, ":")
		u := unitOfPath(path)
		if u != "" && (best == "" || controllers == "" || controllers == "name=systemd") {
			best = u
		}
	}
	return best
}

func unitOfPath(path string) string {
	parts := strings.Split(path, "/")
	for i := len(parts) - 1; i >= 0; i-- {
		p := parts[i]
		name := strings.TrimSuffix(strings.TrimSuffix(p, ".scope"), ".service")
		if id := name[strings.LastIndexByte(name, '-')+1:]; len(id) == 64 && isHex(id) {
			return strings.TrimSuffix(name, id) + id[:12]
		}
		if name != p {
			return p
		}
	}
	return ""
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

func matches(list []string, name string) bool {
	for _, p := range list {
		if prefix, ok := strings.CutSuffix(p, "*"); name == p || ok && strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// firstNumber reads the number at the start of s, -1 if there is none.
func firstNumber(s string) int {
	n, i := 0, 0
	for i < len(s) && i < 10 && s[i] >= '0' && s[i] <= '9' {
		n = n*10 + int(s[i]-'0')
		i++
	}
	if i == 0 {
		return -1
	}
	return n
}
