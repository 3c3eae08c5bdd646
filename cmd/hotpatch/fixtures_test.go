package main

import (
	"fmt"
	"time"

	"hotpatchd/agent/control"
)

// The documents that screens and scripts show: one machine on one day.

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) control.Time { return control.At(now.Add(-d)) }

func header(format string) control.Header {
	return control.Header{Format: format, Generated: control.At(now), Version: "1.2"}
}

const days = 24 * time.Hour

func coverage(n map[control.ImageState]int, processes int) control.Coverage {
	var c control.Coverage
	for s, k := range n {
		for range k {
			c.Add(s)
		}
	}
	c.Processes = processes
	return c
}

func wellStatus() *control.Status {
	st := &control.Status{
		Header: header(control.FormatStatus), Eligible: true, State: control.Hotpatched,
		Releases: []control.ActiveRelease{{Product: "acme-server", ID: "ACME-2026-11", Sequence: 2, Month: "2026-11", Since: ago(11 * days),
			Title: "heap overflow in the frame parser", Severity: "critical", CVEs: []string{"CVE-2026-10142", "CVE-2026-10150"}}},
		Baseline: control.Baseline{ID: "", Month: "2026-10", Current: true},
		Coverage: coverage(map[control.ImageState]int{control.Patched: 41}, 38),
		Repository: control.Repository{URL: "https://patches.example.com", LastCheck: ago(3 * time.Minute),
			Expires: control.At(now.Add(7 * days))},
		Next: control.Next{Hotpatch: control.At(now.Add(16 * days)), Baseline: control.At(now.Add(51 * days))},
		Device: control.Device{Name: "PC-0417", OS: "Windows 11", Edition: "Enterprise", Build: "26100.7092",
			Arch: "amd64", ID: "3f2a"},
		Backend: control.Backend{Name: "win32", Freeze: "one thread after the other"},
		Waived:  []string{"vbs"}, Mode: "automatic", Scanned: ago(time.Second),
	}
	st.Release = &st.Releases[0]
	return st
}

func openProcesses() *control.Processes {
	return &control.Processes{
		Header: header(control.FormatProcesses), Coverage: coverage(map[control.ImageState]int{control.Patched: 39, control.Busy: 1, control.Blocked: 1}, 38),
		Others: 214, Release: "ACME-2026-11", Sequence: 2, Scanned: ago(time.Second),
		Processes: []control.Process{
			{PID: 2216, Exe: `C:\Acme\srv.exe`, User: "svc-feed", Images: []control.Image{{Name: "app.dll", Base: 0x7ffb2a3c0000, Product: "acme-server",
				Release: "ACME-2026-11", Sequence: 2, State: control.Busy, ReasonCode: "thread", Reason: "thread 2298 is in ReadFrame",
				Since: ago(250 * time.Second), Remedy: control.RemedyWait, Attempts: 12}}},
			{PID: 880, Exe: `C:\Vault\vault.exe`, User: "SYSTEM", Images: []control.Image{{Name: "app.dll", Base: 0x7ffb11000000, Product: "acme-server",
				Release: "ACME-2026-11", Sequence: 2, State: control.Blocked, ReasonCode: "denied", Reason: `denied by policy: deny = C:\Vault\*`,
				Since: ago(11 * days), Remedy: control.RemedyPolicy}}},
		},
	}
}

func openStatus() *control.Status {
	st := wellStatus()
	st.State = control.Incomplete
	st.Coverage = openProcesses().Coverage
	return st
}

// manyProcesses has rows of every kind, some of them alike.
func manyProcesses() *control.Processes {
	d := openProcesses()
	for i := range 5 {
		d.Processes = append(d.Processes, control.Process{PID: 3000 + i, Exe: `C:\Acme\worker.exe`, User: "svc-feed",
			Images: []control.Image{{Name: "app.dll", Product: "acme-server", Release: "ACME-2026-11", Sequence: 2, State: control.Patched, PauseUS: int64(90 + 10*i)}}})
	}
	for i := range 3 {
		d.Processes = append(d.Processes, control.Process{PID: 4000 + i, Exe: `C:\Acme\client.exe`, User: fmt.Sprint("user", i),
			Images: []control.Image{{Name: "app.dll", Product: "acme-server", State: control.Patched, PauseUS: 14200}}})
	}
	d.Processes = append(d.Processes,
		control.Process{PID: 2214, Exe: `C:\Acme\srv.exe`, User: "svc-feed", Images: []control.Image{
			{Name: "app.dll", State: control.Patched, PauseUS: 97}, {Name: "codec.dll", State: control.Patched, PauseUS: 97}}},
		control.Process{PID: 31007, Exe: `C:\srv\a folder with a very long name indeed\feed.exe`, Host: "wine64", User: "wine1", Unit: "feed@1.service", Images: []control.Image{
			{Name: "app.dll", State: control.Blocked, ReasonCode: "tracer", Reason: "traced by strace (pid 31211)", Remedy: control.RemedyWait, Attempts: 3}}},
		control.Process{PID: 30112, Exe: `C:\old\feed.exe`, Host: "wine64", User: "wine1", Unit: "feed-old.service", Images: []control.Image{
			{Name: "app.dll", State: control.OtherBuild, ReasonCode: "identity", Reason: "this build is not one that the release names", Remedy: control.RemedyAuthor}}},
		control.Process{PID: 5, Exe: `evil\x.exe`, User: "m\x1b[31mallory\u202e", Images: []control.Image{
			{Name: "app.dll", State: control.Drifted, ReasonCode: "bytes", Reason: "bytes \x1b]0;owned\x07 differ", Since: ago(49 * time.Hour), Remedy: control.RemedyRestartProcess}}})
	d.Coverage = control.Coverage{Processes: len(d.Processes)}
	for _, p := range d.Processes {
		for _, i := range p.Images {
			d.Coverage.Add(i.State)
		}
	}
	return d
}

func oneProcess() *control.Processes {
	return &control.Processes{Header: header(control.FormatProcesses), Scanned: ago(0), Processes: []control.Process{{
		PID: 2216, Exe: `C:\Acme\srv.exe`, Host: "wine64", User: "svc-feed", Unit: "feed@1.service",
		Images: []control.Image{
			{Name: "app.dll", Base: 0x7ffb2a3c0000, Release: "ACME-2026-11", Sequence: 2, State: control.Patched, PauseUS: 104, Path: `C:\Acme\app.dll`,
				Annex: &control.Annex{Address: 0x7ffb2a4e0000, Size: 20 << 10, Functions: []control.AnnexFunction{
					{Name: "ReadFrame", Address: 0x7ffb2a4e1040, Size: 430}, {Name: "CheckLen", Address: 0x7ffb2a4e1210}}}},
			{Name: "codec.dll", Base: 0x7ffb30000000, Release: "ACME-2026-11", Sequence: 2, State: control.Drifted, Reason: "Decode is not what the release expects",
				Detail: "at 7ffb30001000: expected 40 53 48 83, found e9 12 34 56", Since: ago(time.Hour), Remedy: control.RemedyRestartProcess}}}}}
}

func eligibilityDoc() *control.Eligibility {
	return &control.Eligibility{Header: header(control.FormatEligibility), Looked: ago(20 * time.Minute), Again: control.At(now.Add(40 * time.Minute)), Checks: []control.Check{
		{ID: "os", Title: "Windows 11", Result: control.Pass, Found: "Windows 11"},
		{ID: "edition", Title: "Enterprise", Result: control.Pass, Found: "Enterprise"},
		{ID: "arch", Title: "64-bit", Result: control.Pass, Found: "arm64, native"},
		{ID: "vbs", Title: "Virtualization-based security is running", Result: control.Fail, Wanted: "running", Found: "configured, not running",
			Source: "SystemIsolatedUserModeInformation; DeviceGuard\\EnableVirtualizationBasedSecurity = 1", Since: ago(19 * days),
			Remedy: "turn on virtualization in the firmware, then restart. msinfo32 tells what is missing. A policy may waive it for releases that do not need it: waive = [\"vbs\"]"},
		{ID: "chpe", Title: "CHPE binaries are switched off", Result: control.ResultUnknown, Wanted: "HotPatchRestrictions = 1",
			Found: "could not be read: access denied", Source: `HKLM\SYSTEM\CurrentControlSet\Control\Session Manager\Memory Management`, Remedy: "run the daemon as SYSTEM"},
		{ID: "policy", Title: "Hotpatching is allowed", Result: control.Fail, Wanted: "hotpatch allowed", Found: "no policy file", Source: "/etc/hotpatchd/policy.toml",
			Remedy: "create /etc/hotpatchd/policy.toml with these lines:\nformat = \"hotpatchd-policy/1\"\nenrolled = true\nallow_hotpatch = true"},
		{ID: "managed", Title: "enrolled", Result: control.Fail, Waived: true, Wanted: "enrolled", Found: "not enrolled"},
		{ID: "rights", Title: "may patch", Result: control.NotApplicable},
	}}
}

func eligibleDoc() *control.Eligibility {
	d := eligibilityDoc()
	d.Eligible = true
	d.Checks[3].Result, d.Checks[4].Result = control.Pass, control.Pass
	d.Checks[3].Found, d.Checks[4].Found = "running", ""
	d.Checks[5].Result, d.Checks[5].Found = control.Pass, "allow_hotpatch = true"
	return d
}

func offersDoc() *control.Offers {
	return &control.Offers{Header: header(control.FormatOffers), Eligible: true, Releases: []control.Offer{
		{ID: "ACME-2026-12", Product: "acme-server", Kind: "hotpatch", Sequence: 3, Month: "2026-12", Severity: "critical", Title: "frame parser again", Fits: true},
		{ID: "ACME-2026-11", Product: "acme-server", Kind: "hotpatch", Sequence: 2, Month: "2026-11", Severity: "critical", Title: "heap overflow in the frame parser", Fits: true, InForce: true},
		{ID: "ACME-2026-10", Product: "acme-server", Kind: "hotpatch", Sequence: 1, Month: "2026-10", Severity: "moderate", Title: "first", ReasonCode: "superseded", Reason: "ACME-2026-11, sequence 2, replaces it"},
		{ID: "OTHER-1", Product: "other", Kind: "hotpatch", Sequence: 1, Month: "2026-11", Severity: "low", Held: true, Fits: true, Reason: "held by alice"},
	}}
}

func planDoc() *control.Plan {
	image := control.PlannedImage{Name: "app.dll", Base: 0x7ffb2a3c0000, Product: "acme-server", Release: "ACME-2026-11", Sequence: 2, State: control.Patched,
		Consistency: "entry", Identity: &control.Identity{Machine: 0x8664, SizeOfImage: 272 << 10, TimeStamp: 0x66a1f0c3, CheckSum: 0x4b1d2, RSDS: "5d0f/1"},
		Functions: []control.PlannedFunc{
			{Name: "ReadFrame", RVA: 0x14a0, Size: 412, Address: 0x7ffb2a3c14a0, New: 0x7ffb2a4e1040, Method: "two-byte jump into owned filler"},
			{Name: "CheckLen", RVA: 0x2210, Size: 96, Address: 0x7ffb2a3c2210, New: 0x7ffb2a4e1210, Method: "five-byte jump"}},
		Annex: &control.Annex{Address: 0x7ffb2a4e0000, Size: 20 << 10, Segments: []control.Segment{{Size: 4096, Prot: "r--"}, {Size: 8192, Prot: "r-x"}, {Size: 4096, Prot: "r--"}, {Size: 4096, Prot: "rw-"}}},
		Binds: []control.Bind{{Name: "g_limits", Kind: "pointer", Found: true}, {Name: "KERNEL32!HeapAlloc", Kind: "import", Found: true}},
		Sites: []control.Site{
			{Name: "ReadFrame", RVA: 0x149b, Address: 0x7ffb2a3c149b, Kind: "pad", OldBytes: "cccccccccc", NewBytes: "e968eb1100", OldText: []string{"filler"}, NewText: []string{"jmp 7ffb2a4e0008"}, Order: 1},
			{Name: "CheckLen", RVA: 0x2210, Address: 0x7ffb2a3c2210, Kind: "entry", OldBytes: "40534883ec20", NewBytes: "e9fbdd110020", OldText: []string{"push rbx", "sub rsp, 20h"}, NewText: []string{"jmp 7ffb2a4e0010", "(rest of it)"}, Order: 2},
			{Name: "ReadFrame", RVA: 0x14a0, Address: 0x7ffb2a3c14a0, Kind: "entry", OldBytes: "4889", NewBytes: "ebf9", OldText: []string{"mov [rsp+8], rbx"}, NewText: []string{"jmp 7ffb2a3c149b"}, Order: 3},
		}}
	vault := control.PlannedImage{Name: "app.dll", State: control.Blocked, Reason: `denied by policy: C:\Vault\*`, Functions: image.Functions, Remedy: control.RemedyPolicy}
	old := control.PlannedImage{Name: "app.dll", State: control.OtherBuild, Reason: "this build is not one that the release names"}
	return &control.Plan{Header: header(control.FormatPlan), Release: "ACME-2026-11", Sequence: 2, Product: "acme-server",
		Coverage: coverage(map[control.ImageState]int{control.Patched: 1, control.Blocked: 1, control.OtherBuild: 1}, 3),
		Processes: []control.PlannedProcess{
			{PID: 2216, Exe: `C:\Acme\srv.exe`, User: "svc-feed", Threads: 14, Images: []control.PlannedImage{image}},
			{PID: 880, Exe: `C:\Vault\vault.exe`, Images: []control.PlannedImage{vault}},
			{PID: 30112, Exe: `C:\old\feed.exe`, Images: []control.PlannedImage{old}}}}
}

func planOf(n int) *control.Plan {
	d := planDoc()
	d.Processes = d.Processes[n : n+1]
	return d
}

func refusedPlan() *control.Plan {
	d := planOf(0)
	i := &d.Processes[0].Images[0]
	i.Sites, i.Annex, i.Binds = nil, nil, nil
	i.State, i.Refused = control.Blocked, &control.Refusal{Code: "jump-target", Text: "a jump at 7ffb2a3c1500 leads into the bytes of ReadFrame"}
	return d
}

func change(action string, changed bool, states ...control.ImageState) *control.Change {
	c := &control.Change{Header: header(control.FormatChange), Action: action, Changed: changed, Release: "ACME-2026-11", Sequence: 2, Product: "acme-server"}
	for i, st := range states {
		im := control.Image{Name: "app.dll", Release: "ACME-2026-11", Sequence: 2, State: st, PauseUS: int64(100 + 70*i)}
		if st == control.Busy {
			im.Reason, im.Remedy, im.Attempts, im.PauseUS = "thread 2298 is in ReadFrame", control.RemedyWait, 3, 0
		}
		c.Results = append(c.Results, control.Process{PID: 2210 + i, Exe: `C:\Acme\srv.exe`, Images: []control.Image{im}})
	}
	return c
}

func rolledBack() *control.Change {
	c := change("rollback", true, control.Patched, control.Patched)
	for i := range c.Results {
		c.Results[i].Images[0].Release, c.Results[i].Images[0].Sequence = "ACME-2026-10", 1
	}
	c.Previous, c.Reopened = "ACME-2026-10", []string{"CVE-2026-10150"}
	return c
}

func verifyBad() *control.Verify {
	return &control.Verify{Header: header(control.FormatVerify), Processes: 38, Images: 41, Sites: 82,
		Mismatches: []control.Mismatch{{PID: 2216, Exe: `C:\Acme\srv.exe`, Image: "app.dll", Function: "ReadFrame", Address: 0x7ffb2a3c14a0, Expected: "ebf9", Found: "4889", Text: "the old bytes are back"}},
		Unread:     []control.Mismatch{{PID: 900, Exe: "x.exe", Image: "app.dll", Text: "access denied"}}, History: "history entry 17 was changed: its hash does not match"}
}

func settingsDoc() *control.Settings {
	return &control.Settings{
		Policy: []control.Setting{
			{Key: "enrolled", Value: "true", Source: `HKLM\SOFTWARE\Policies\hotpatchd, enrolled`},
			{Key: "allow_hotpatch", Value: "not set", Source: "default"},
			{Key: "mode", Value: `"automatic"`, Source: `C:\ProgramData\hotpatchd\policy.toml:4`},
			{Key: "hold", Value: `["ACME-2026-11"]`, Source: `C:\ProgramData\hotpatchd\policy.toml:5`},
		},
		Configuration: []control.Setting{
			{Key: "state_dir", Value: `"C:\\ProgramData\\hotpatchd\\state"`, Source: "default"},
			{Key: "repository.url", Value: `"https://patches.example.com"`, Source: `C:\ProgramData\hotpatchd\config.toml:6`},
		},
	}
}

func historyDoc() *control.History {
	return &control.History{Header: header(control.FormatHistory), Entries: []control.HistoryEntry{
		{Seq: 3, Time: ago(time.Hour), Caller: control.HistoryCaller{UID: 1000, User: "alice", PID: 99}, Action: "rollback", Release: "ACME-2026-11", Text: "rolled back"},
		{Seq: 2, Time: ago(11 * days), Caller: control.HistoryCaller{User: "hotpatchd"}, Action: "applied", Release: "ACME-2026-11", PID: 2216, Exe: `C:\Acme\srv.exe`, Image: "app.dll", Text: "2 functions in 104 us"},
		{Seq: 1, Time: ago(400 * days), Caller: control.HistoryCaller{User: "hotpatchd"}, Action: "start"},
	}}
}

func explainDoc() *control.Explain {
	return &control.Explain{Header: header(control.FormatExplain), PID: 2216, Exe: `C:\Acme\srv.exe`, Address: 0x7ffb2a4e1060, Kind: "new-function",
		Image: "app.dll", Release: "ACME-2026-11", Function: "ReadFrame", Offset: 0x20, Text: "32 bytes into the new ReadFrame of ACME-2026-11"}
}
