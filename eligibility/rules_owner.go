package eligibility

import "fmt"

// The rules on what the owner and the device's security set-up say.

// ownersWord judges a yes or no of the policy file. decided is false when the
// file says nothing about it and device management is to be asked.
func (j judge) ownersWord(id ID, key, wanted string, word *bool) (c Check, decided bool) {
	c = Check{ID: id, Title: titles[id], Wanted: wanted, Source: j.policy.Source}
	if c.Source == "" {
		c.Source = "policy file"
	}
	set := fmt.Sprintf("set %s = true in %s", key, c.Source)
	switch {
	case j.policy.Problem != "":
		return c.unknown("could not be read: "+j.policy.Problem, "mend "+c.Source+" (hotpatchd check-config shows where)"), true
	case word == nil:
		return c, false
	case *word:
		c.Found = key + " = true"
		return c.pass(), true
	}
	c.Found = key + " = false"
	return c.fail(set), true
}

// silent is the answer where only the policy file counts and it says nothing.
func (j judge) silent(c Check, key string) Check {
	if j.policy.Absent {
		c.Found = "no policy file"
		return c.fail(fmt.Sprintf("create %s with these lines:\nformat = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = true", c.Source))
	}
	c.Found = key + " is not set"
	return c.fail(fmt.Sprintf("set %s = true in %s", key, c.Source))
}

func (j judge) managed() Check {
	const wanted = "enrolled"
	c, decided := j.ownersWord(Managed, "enrolled", wanted, j.policy.Enrolled)
	if decided {
		return c
	}
	remedy := `enrol the device in Intune, or set enrolled = true in ` + c.Source
	switch j.profile {
	case WindowsClient:
	case WindowsServer:
		remedy = `enrol the server (Azure Edition: Update Manager; others: Azure Arc), or set enrolled = true in ` + c.Source
	default:
		return j.silent(c, "enrolled")
	}
	c, f, ok := j.begin(Managed, wanted, "the enrolment keys under HKLM\\SOFTWARE\\Microsoft must be readable by the service; or set enrolled = true in "+c.Source)
	if !ok {
		return c
	}
	if f.Value != Enrolled {
		return c.fail(remedy)
	}
	return c.pass()
}

func (j judge) permission() Check {
	const wanted = "hotpatch allowed"
	c, decided := j.ownersWord(Permission, "allow_hotpatch", wanted, j.policy.AllowHotpatch)
	if decided {
		return c
	}
	own := "or set allow_hotpatch = true in " + c.Source
	switch j.profile {
	case WindowsClient:
		c, f, ok := j.begin(Permission, wanted, `HKLM\SOFTWARE\Microsoft\PolicyManager\current\device\Update must be readable by the service, `+own)
		switch {
		case !ok:
			return c
		case f.Value != Allowed:
			return c.fail(`set "When available, apply without restarting the device" to Allow in a Windows quality update policy (AllowRebootlessUpdates = 1), ` + own)
		}
		return c.pass()
	case WindowsServer:
		// On servers the enrolment is the permission; a fact that says no still counts.
		if f := j.facts[Permission]; f.Known && f.Value != Allowed {
			c, _, _ = j.begin(Permission, wanted, "")
			return c.fail("switch the hotpatch engine on: install the hotpatch enrolment package and restart once, " + own)
		}
		return inapplicable(Permission, "a server's enrolment is its permission")
	}
	return j.silent(c, "allow_hotpatch")
}

func (j judge) vbs() Check {
	if j.profile != WindowsClient && j.profile != WindowsServer {
		return inapplicable(VBS, "a feature of Windows")
	}
	if j.profile == WindowsServer && j.facts[OS].Value == Server2022 {
		return inapplicable(VBS, Server2022+" does not ask for it")
	}
	c, f, ok := j.begin(VBS, Running, waivable(VBS, "SystemIsolatedUserModeInformation must be readable; msinfo32 shows it too"))
	switch {
	case !ok:
		return c
	case f.Value == Running:
		return c.pass()
	case f.Value == Configured:
		return c.fail(waivable(VBS, "turn on virtualization in the firmware, then restart; msinfo32 tells what is missing"))
	}
	return c.fail(waivable(VBS, `set EnableVirtualizationBasedSecurity = 1 under HKLM\SYSTEM\CurrentControlSet\Control\DeviceGuard, then restart`))
}

func (j judge) chpe() Check {
	if j.profile != WindowsClient {
		return inapplicable(CHPE, "no CHPE binaries on this system")
	}
	if j.facts[Arch].Value == AMD64 {
		return inapplicable(CHPE, "amd64 has no CHPE binaries")
	}
	c, f, ok := j.begin(CHPE, "HotPatchRestrictions = 1", `HKLM\SYSTEM\CurrentControlSet\Control\Session Manager\Memory Management must be readable by the service`)
	switch {
	case !ok:
		return c
	case f.Value == Off:
		return c.pass()
	}
	return c.fail("set the DWORD HotPatchRestrictions to 1, then restart once; it survives updates")
}

func (j judge) baseline() Check {
	if j.profile != WindowsClient && j.profile != WindowsServer {
		return inapplicable(Baseline, "baselines are a Windows matter; a release names the images it fits")
	}
	wanted := j.facts[Baseline].Wanted
	text := wanted + " or later"
	if wanted == "" {
		text = "the baseline in force"
	}
	c, f, ok := j.begin(Baseline, text, "the build and the list of baselines must be readable; refresh the repository with: hotpatch check")
	switch {
	case !ok:
		return c
	case !month(f.Value):
		return c.unknown(c.Found+", which is not a month", "the installed baseline must be told as YYYY-MM")
	case !month(wanted):
		return c.unknown(c.Found+", but which baseline is in force is not known", "refresh the repository with: hotpatch check")
	case f.Value < wanted: // months compare as text
		return c.fail("install the baseline of " + wanted + ", with a restart")
	}
	return c.pass()
}

// month tells whether s is YYYY-MM.
func month(s string) bool {
	if len(s) != 7 || s[4] != '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		if i != 4 && (s[i] < '0' || s[i] > '9') {
			return false
		}
	}
	return s[5:] >= "01" && s[5:] <= "12"
}

func (j judge) rights() Check {
	readable, remedy := "ask the backend again: restart the daemon and read its log", "run the daemon as root with CAP_SYS_PTRACE (a unit must name it in CapabilityBoundingSet), and see that kernel.yama.ptrace_scope is below 3"
	if j.profile != LinuxDevice {
		remedy = "run the daemon as a service under SYSTEM with SeDebugPrivilege"
	}
	c, f, ok := j.begin(Rights, "to read, write and stop other processes", readable)
	switch {
	case !ok:
		return c
	case f.Value == Granted:
		return c.pass()
	}
	return c.fail(remedy)
}
