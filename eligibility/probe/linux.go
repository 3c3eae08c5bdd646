package probe

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"strings"

	"hotpatchd/eligibility"
)

// root is where the files of a Linux system lie; tests have their own. Nothing
// here needs Linux to be compiled or tested.
type root struct{ fs.FS }

// maxFile bounds what is read of any of these files; real ones are below 4 KiB.
const maxFile = 64 << 10

// Where Linux keeps what we read. os-release(5), machine-id(5).
var (
	releaseFiles = []string{"etc/os-release", "usr/lib/os-release"}
	machineFiles = []string{"etc/machine-id", "var/lib/dbus/machine-id"}
)

// name is what utsname(2) says.
type name struct {
	system, release, machine string
	err                      error
}

// collect gathers the facts of a Linux device. rights asks the backend what the
// system lets it do: a sentence, or an error if it can do nothing.
func (r root) collect(ctx context.Context, uname name, rights func(context.Context) (string, error)) eligibility.Facts {
	f := eligibility.Facts{
		eligibility.OS:      fromUname(uname, uname.system),
		eligibility.Version: fromUname(uname, uname.release),
		eligibility.Arch:    fromUname(uname, goArch(uname.machine)),
		eligibility.Edition: r.distribution(),
		eligibility.Rights:  r.blind(askRights(ctx, rights)),
	}
	return f
}

func fromUname(n name, value string) eligibility.Fact {
	if n.err != nil {
		return eligibility.Fact{Source: "uname", Problem: n.err.Error()}
	}
	return eligibility.Fact{Known: true, Value: value, Source: "uname"}
}

// goArch spells utsname's machine as Go does. A 32-bit program on a 64-bit
// kernel sees the kernel's word, as it should; personality(2) could hide it.
func goArch(machine string) string {
	switch machine {
	case "x86_64":
		return eligibility.AMD64
	case "aarch64":
		return eligibility.ARM64
	case "i386", "i486", "i586", "i686":
		return "386"
	}
	return machine
}

func (r root) distribution() eligibility.Fact {
	problem := "there is no os-release"
	for _, path := range releaseFiles {
		text, err := r.read(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			problem = err.Error()
			break
		}
		fields := osRelease(text)
		for _, key := range []string{"PRETTY_NAME", "NAME", "ID"} {
			if fields[key] != "" {
				return eligibility.Fact{Known: true, Value: fields[key], Source: "/" + path}
			}
		}
		problem = "/" + path + " names no distribution"
		break
	}
	return eligibility.Fact{Source: "/" + releaseFiles[0], Problem: problem}
}

// osRelease reads the assignments of an os-release file. Lines that are none
// are passed over, as the shell that the format is made for would.
func osRelease(text string) map[string]string {
	fields := map[string]string{}
	lines := bufio.NewScanner(strings.NewReader(text))
	for lines.Scan() {
		key, value, ok := strings.Cut(strings.TrimSpace(lines.Text()), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		fields[key] = printable(value)
	}
	return fields
}

// maxText bounds what a device's file may make us say.
const maxText = 256

// printable makes text from a file fit for one line on a terminal.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return -1
		}
		return r
	}, s)
	if len(s) > maxText {
		s = strings.ToValidUTF8(s[:maxText], "")
	}
	return s
}

func askRights(ctx context.Context, ask func(context.Context) (string, error)) eligibility.Fact {
	if ask == nil {
		return eligibility.Fact{Source: "backend", Problem: "no backend was asked"}
	}
	sentence, err := ask(ctx)
	switch {
	case ctx.Err() != nil:
		return eligibility.Fact{Source: "backend", Problem: "it did not answer in time"}
	case err != nil:
		return eligibility.Fact{Known: true, Value: eligibility.Denied, Text: err.Error(), Source: "backend"}
	}
	return eligibility.Fact{Known: true, Value: eligibility.Granted, Text: sentence, Source: "backend"}
}

// capSysPtrace is the number of CAP_SYS_PTRACE (capabilities(7)).
const capSysPtrace = 19

// blind denies the rights of a daemon that runs as root and yet may not look
// into the processes of others: a unit that restricts capabilities, a container.
// A trial on a child of ours does not show it. An ordinary user's daemon is for
// that user's processes and is not meant.
func (r root) blind(f eligibility.Fact) eligibility.Fact {
	if f.Value != eligibility.Granted {
		return f
	}
	text, err := r.read("proc/self/status")
	if err != nil {
		return f
	}
	fields := map[string][]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(line, ":"); ok {
			fields[key] = strings.Fields(value)
		}
	}
	uid, caps := fields["Uid"], fields["CapEff"]
	if len(uid) < 2 || uid[1] != "0" || len(caps) != 1 {
		return f
	}
	effective, err := strconv.ParseUint(caps[0], 16, 64)
	if err != nil || effective>>capSysPtrace&1 != 0 {
		return f
	}
	return eligibility.Fact{Known: true, Value: eligibility.Denied, Source: "/proc/self/status",
		Text: "root without CAP_SYS_PTRACE: most processes cannot be looked into"}
}

// deviceID hashes the first machine id that is there. An id that is there but
// not well-formed is an error, not a reason to look further: which one counts
// must not change from start to start.
func (r root) deviceID() (string, error) {
	for _, path := range machineFiles {
		text, err := r.read(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("cannot read the machine id: %w", err)
		}
		id, err := machineID(text)
		if err != nil {
			return "", fmt.Errorf("cannot use the machine id in /%s: %w (systemd-machine-id-setup writes one)", path, err)
		}
		return hashID(id), nil
	}
	return "", fmt.Errorf("cannot tell this device from others: there is no /%s (systemd-machine-id-setup writes one)", machineFiles[0])
}

func (r root) read(path string) (string, error) {
	f, err := r.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return "", err
	}
	if len(b) > maxFile {
		return "", fmt.Errorf("/%s is longer than %d bytes", path, maxFile)
	}
	return string(b), nil
}
