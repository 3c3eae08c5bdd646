package probe

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"hotpatchd/eligibility"
)

// hive is HKEY_LOCAL_MACHINE as far as it is read. Keys are paths below
// it. What is not there is an error that is fs.ErrNotExist. Nothing in this
// file needs Windows to be compiled or tested.
type hive interface {
	Text(key, name string) (string, error)   // REG_SZ
	Number(key, name string) (uint64, error) // REG_DWORD
	Keys(key string) ([]string, error)       // names of the keys below
}

// Where Windows keeps what we read; learn.microsoft.com, "Hotpatch updates"
// (Windows Autopatch) and the policy CSPs name those of the last four.
const (
	keyVersion    = `SOFTWARE\Microsoft\Windows NT\CurrentVersion`
	keyMachine    = `SOFTWARE\Microsoft\Cryptography`
	keyEnrolments = `SOFTWARE\Microsoft\Enrollments`
	keyUpdate     = `SOFTWARE\Microsoft\PolicyManager\current\device\Update`
	keyGuard      = `SYSTEM\CurrentControlSet\Control\DeviceGuard`
	keyMemory     = `SYSTEM\CurrentControlSet\Control\Session Manager\Memory Management`
	keyServer     = keyVersion + `\Update\TargetingInfo\DynamicInstalled\Hotpatch.amd64`
)

// maxEnrolments bounds how many enrolments are looked at; a device has a handful.
const maxEnrolments = 256

func source(key string, names ...string) string {
	return `HKLM\` + key + ", " + strings.Join(names, ", ")
}

// Machine types of IsWow64Process2 (winnt.h, IMAGE_FILE_MACHINE_*).
const (
	machineI386  = 0x014c
	machineAMD64 = 0x8664
	machineARM64 = 0xaa64
)

// osVersion is what RtlGetVersion says.
type osVersion struct {
	major, minor, build uint32
	server              bool // the product type is not "workstation"
}

// token is what our own token lets us do.
type token struct {
	user     string
	elevated bool
	debug    bool // SeDebugPrivilege can be switched on
}

// systemCalls is what is asked by calls. Each may fail where a Windows does not have it.
type systemCalls interface {
	Version() (osVersion, error)
	Machine() (native uint16, err error)
	// Isolated is SystemIsolatedUserModeInformation: its first byte.
	Isolated() (flags byte, err error)
	// Engine tells whether the kernel's own hotpatch engine is on.
	Engine() (bool, error)
	Token() (token, error)
}

// device is a Windows device that can be asked.
type device struct {
	reg hive
	sys systemCalls
}

func known(value, text, source string) eligibility.Fact {
	return eligibility.Fact{Known: true, Value: value, Text: printable(text), Source: source}
}

func unknown(source string, err error) eligibility.Fact {
	return eligibility.Fact{Source: source, Problem: printable(err.Error())}
}

// collect gathers the facts of a Windows device.
func (d device) collect(ctx context.Context, rights func(context.Context) (string, error)) eligibility.Facts {
	f := eligibility.Facts{}
	f[eligibility.OS] = d.os()
	f[eligibility.Edition] = d.edition()
	f[eligibility.Version] = d.version()
	f[eligibility.Arch] = d.arch()
	f[eligibility.VBS] = d.vbs()
	f[eligibility.CHPE] = d.chpe(f[eligibility.Arch])
	f[eligibility.Baseline] = eligibility.Fact{Source: source(keyVersion, "UBR"),
		Problem: "which build belongs to which baseline is told by a baseline release, of which there is none"}
	f[eligibility.Rights] = d.rights(ctx, rights)
	if eligibility.ProfileOf(f) == eligibility.WindowsServer {
		f[eligibility.Managed], f[eligibility.Permission] = d.serverEnrolment(), d.Engine()
		if f[eligibility.Permission].Known {
			f[eligibility.Permission] = asPermission(f[eligibility.Permission])
		}
		return f
	}
	f[eligibility.Managed], f[eligibility.Permission] = d.enrolment(), d.permission()
	return f
}

// os names the system. ProductName says "Windows 10" on Windows 11 too, so that
// the build decides; and multi-session Windows calls itself a server product,
// so that InstallationType decides between client and server.
func (d device) os() eligibility.Fact {
	from := "RtlGetVersion; " + source(keyVersion, "InstallationType")
	v, err := d.sys.Version()
	if err != nil {
		return unknown(from, err)
	}
	kind, err := d.reg.Text(keyVersion, "InstallationType")
	if err != nil {
		// Not known, but by the rules of which it is judged can be told.
		f := unknown(from, err)
		f.Value = osName(v, v.server)
		return f
	}
	switch {
	case strings.EqualFold(kind, "Client"):
		return known(osName(v, false), "", from)
	case strings.HasPrefix(strings.ToLower(kind), "server"), strings.EqualFold(kind, "Nano Server"):
		return known(osName(v, true), "", from)
	}
	f := unknown(from, fmt.Errorf("InstallationType is %q, which is neither a client nor a server", kind))
	f.Value = osName(v, v.server)
	return f
}

// osName is the name of the product line of a build.
func osName(v osVersion, server bool) string {
	switch {
	case v.major != 10 || v.minor != 0:
		return fmt.Sprintf("Windows %d.%d", v.major, v.minor)
	case server && v.build >= 26100:
		return eligibility.Server2025
	case server && v.build >= 20348:
		return eligibility.Server2022
	case server && v.build >= 17763:
		return eligibility.Server2019
	case server:
		return "Windows Server 2016"
	case v.build >= 22000:
		return eligibility.Windows11
	}
	return eligibility.Windows10
}

func (d device) edition() eligibility.Fact {
	from := source(keyVersion, "EditionID")
	id, err := d.reg.Text(keyVersion, "EditionID")
	if err == nil && printable(id) == "" {
		err = errors.New("EditionID is empty")
	}
	if err != nil {
		return unknown(from, err)
	}
	return known(printable(id), "", from)
}

// version takes the build from the kernel, which no manifest shims, and the
// revision from the registry, and believes neither where they disagree.
func (d device) version() eligibility.Fact {
	from := "RtlGetVersion; " + source(keyVersion, "CurrentBuildNumber", "UBR", "DisplayVersion")
	v, err := d.sys.Version()
	if err != nil {
		return unknown(from, err)
	}
	text, err := d.reg.Text(keyVersion, "CurrentBuildNumber")
	if err != nil {
		return unknown(from, err)
	}
	build, err := strconv.ParseUint(text, 10, 32)
	if err != nil {
		return unknown(from, fmt.Errorf("CurrentBuildNumber is %q, which is no number", text))
	}
	if uint32(build) != v.build {
		return unknown(from, fmt.Errorf("the kernel says build %d, the registry %d", v.build, build))
	}
	ubr, err := d.reg.Number(keyVersion, "UBR")
	if err != nil {
		return unknown(from, err)
	}
	value := fmt.Sprintf("%d.%d", build, ubr)
	if label, err := d.reg.Text(keyVersion, "DisplayVersion"); err == nil && printable(label) != "" {
		return known(value, label+", "+value, from)
	}
	return known(value, "", from) // the label is for people only
}

func (d device) arch() eligibility.Fact {
	const from = "IsWow64Process2"
	native, err := d.sys.Machine()
	if err != nil {
		return unknown(from, err)
	}
	switch native {
	case machineAMD64:
		return known(eligibility.AMD64, "", from)
	case machineARM64:
		return known(eligibility.ARM64, "", from)
	case machineI386:
		return known("386", "", from)
	}
	return known(fmt.Sprintf("machine %#x", native), "", from)
}

// enrolment looks for an enrolment by Microsoft's device management. One that
// cannot be read leaves the answer open, unless another one is good.
func (d device) enrolment() eligibility.Fact {
	from := source(keyEnrolments, "ProviderID", "EnrollmentState", "EnrollmentType")
	names, err := d.reg.Keys(keyEnrolments)
	if errors.Is(err, fs.ErrNotExist) {
		return known(eligibility.NotEnrolled, "not enrolled: "+err.Error(), from)
	}
	if err != nil {
		return unknown(from, err)
	}
	if len(names) > maxEnrolments {
		return unknown(from, fmt.Errorf("there are %d enrolments, at most %d are read", len(names), maxEnrolments))
	}
	var unread error
	for _, n := range names {
		key := keyEnrolments + `\` + n
		provider, err := d.reg.Text(key, "ProviderID")
		if errors.Is(err, fs.ErrNotExist) { // most of them: no device management
			continue
		}
		if err == nil && !strings.EqualFold(provider, "MS DM Server") {
			continue
		}
		var state, kind uint64
		if err == nil {
			state, err = d.reg.Number(key, "EnrollmentState")
		}
		if err == nil {
			kind, err = d.reg.Number(key, "EnrollmentType")
		}
		switch {
		case errors.Is(err, fs.ErrNotExist): // begun, never ended
		case err != nil:
			unread = err
		case state == 1 && kind != 0:
			return known(eligibility.Enrolled, "enrolled, "+provider, from)
		}
	}
	if unread != nil {
		return unknown(from, unread)
	}
	return known(eligibility.NotEnrolled, "not enrolled: no enrolment by MS DM Server that is in force", from)
}

// permission is the policy "When available, apply without restarting the device".
func (d device) permission() eligibility.Fact {
	const name = "AllowRebootlessUpdates"
	from := source(keyUpdate, name)
	n, err := d.reg.Number(keyUpdate, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return known(eligibility.NotAllowed, "not allowed: "+err.Error(), from)
	case err != nil:
		return unknown(from, err)
	case n == 1:
		text := name + " = 1"
		if e := d.Engine(); e.Known {
			text += "; the system's own hotpatch engine is " + e.Value
		}
		return known(eligibility.Allowed, text, from)
	}
	return known(eligibility.NotAllowed, fmt.Sprintf("%s = %d", name, n), from)
}

// serverEnrolment is how a server takes part: by a package.
func (d device) serverEnrolment() eligibility.Fact {
	from := source(keyServer, "Name")
	name, err := d.reg.Text(keyServer, "Name")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return known(eligibility.NotEnrolled, "not enrolled: "+err.Error(), from)
	case err != nil:
		return unknown(from, err)
	case strings.EqualFold(name, "Hotpatch Enrollment Package"):
		return known(eligibility.Enrolled, "enrolled, "+name, from)
	}
	return known(eligibility.NotEnrolled, fmt.Sprintf("not enrolled: the package is %q", name), from)
}

// Engine tells whether Windows itself hotpatches its images on this device.
func (d device) Engine() eligibility.Fact {
	const name = "HotPatchTableSize"
	on, err := d.sys.Engine()
	if err == nil {
		return known(onOff(on), "", "NtManageHotPatch")
	}
	from := "NtManageHotPatch; " + source(keyMemory, name)
	size, regErr := d.reg.Number(keyMemory, name)
	switch {
	case errors.Is(regErr, fs.ErrNotExist):
		return known(eligibility.Off, "off: "+regErr.Error(), from)
	case regErr != nil:
		return unknown(from, regErr)
	}
	return known(onOff(size != 0), fmt.Sprintf("%s, %s = %d", onOff(size != 0), name, size), from)
}

func onOff(on bool) string {
	if on {
		return eligibility.On
	}
	return eligibility.Off
}

func asPermission(engine eligibility.Fact) eligibility.Fact {
	engine.Text = "the system's own hotpatch engine is " + engine.Value
	if engine.Value == eligibility.On {
		engine.Value = eligibility.Allowed
	} else {
		engine.Value = eligibility.NotAllowed
	}
	return engine
}

// secureKernel is the first bit of SYSTEM_ISOLATED_USER_MODE_INFORMATION
// (phnt, ntexapi.h): virtualization-based security runs.
const secureKernel = 1

// vbs asks the kernel whether virtualization-based security runs. What the
// registry configures is no proof of it either way, and only words it.
func (d device) vbs() eligibility.Fact {
	const name = "EnableVirtualizationBasedSecurity"
	from := "SystemIsolatedUserModeInformation; " + source(keyGuard, name)
	flags, err := d.sys.Isolated()
	if err != nil {
		return unknown(from, err)
	}
	if flags&secureKernel != 0 {
		return known(eligibility.Running, "", from)
	}
	if n, err := d.reg.Number(keyGuard, name); err == nil && n == 1 {
		return known(eligibility.Configured, "", from)
	}
	return known(eligibility.Off, "", from)
}

// chpe is about the x86 code of ARM64 systems, which Windows cannot hotpatch.
func (d device) chpe(arch eligibility.Fact) eligibility.Fact {
	const name = "HotPatchRestrictions"
	from := source(keyMemory, name)
	if arch.Known && arch.Value != eligibility.ARM64 {
		return eligibility.Fact{NotApplicable: true, Text: "no CHPE binaries on " + arch.Value, Source: from}
	}
	n, err := d.reg.Number(keyMemory, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return known(eligibility.On, "on: "+err.Error(), from)
	case err != nil:
		return unknown(from, err)
	case n == 1:
		return known(eligibility.Off, name+" = 1", from)
	}
	return known(eligibility.On, fmt.Sprintf("%s = %d", name, n), from)
}

// rights is what the backend says, unless our token speaks against it: who is
// elevated and yet has no SeDebugPrivilege does not see most processes. A user
// who is not elevated has the daemon for processes of his own.
func (d device) rights(ctx context.Context, ask func(context.Context) (string, error)) eligibility.Fact {
	f := askRights(ctx, ask)
	if !f.Known || f.Value != eligibility.Granted {
		return f
	}
	f.Source += "; our token"
	t, err := d.sys.Token()
	switch {
	case err != nil:
		return unknown(f.Source, fmt.Errorf("our token cannot be read: %w", err))
	case t.elevated && !t.debug:
		f.Value, f.Text = eligibility.Denied, t.user+" is elevated, without SeDebugPrivilege: most processes cannot be looked into"
	}
	return f
}

// systemImage tells whether Windows hotpatches the image of a file itself: one
// that came with it, on a device whose engine is on or cannot be asked. folder
// is that of Windows, with its drive; path may name the volume in any way.
func systemImage(path, folder string, engine eligibility.Fact) bool {
	if engine.Known && engine.Value == eligibility.Off {
		return false
	}
	return strings.HasPrefix(strings.ToLower(withoutVolume(path)), strings.ToLower(withoutVolume(folder))+`\`)
}

// withoutVolume takes C:, \??\C:, \\?\C: or \Device\HarddiskVolume3 off a path.
func withoutVolume(path string) string {
	path = strings.ReplaceAll(path, "/", `\`)
	if rest, ok := strings.CutPrefix(strings.ToLower(path), `\device\`); ok {
		if i := strings.IndexByte(rest, '\\'); i >= 0 {
			return path[len(path)-len(rest)+i:]
		}
		return path
	}
	for _, prefix := range []string{`\\?\`, `\??\`, `\\.\`} {
		path = strings.TrimPrefix(path, prefix)
	}
	if len(path) > 1 && path[1] == ':' {
		path = path[2:]
	}
	return strings.TrimSuffix(path, `\`)
}

// deviceID hashes the machine's own id.
func (d device) deviceID() (string, error) {
	text, err := d.reg.Text(keyMachine, "MachineGuid")
	if err != nil {
		return "", fmt.Errorf("cannot tell this device from others: %w", err)
	}
	id, err := machineID(text)
	if err != nil {
		return "", fmt.Errorf("cannot use the machine id in %s: %w", source(keyMachine, "MachineGuid"), err)
	}
	return hashID(id), nil
}
