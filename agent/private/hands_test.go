package private

import "testing"

// judged are descriptors, in words of SDDL for Windows, and what is wrong with each.
var judged = []struct {
	name, sddl string
	d          descriptor
	want       string
}{
	{"ours", "O:BAD:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)",
		descriptor{owner: sidAdministrators, entries: []entry{{0, 3, 0x1f01ff, sidSystem}, {0, 3, 0x1f01ff, sidAdministrators}}}, ""},
	{"Program Files", "O:" + sidTrustedInstaller + "D:PAI(A;;FA;;;" + sidTrustedInstaller + ")(A;;0x1301bf;;;SY)(A;OICIIO;GA;;;CO)(A;;0x1200a9;;;BU)(A;OICIIO;GXGR;;;BU)",
		descriptor{owner: sidTrustedInstaller, entries: []entry{{0, 0, 0x1f01ff, sidTrustedInstaller}, {0, 0, 0x1301bf, sidSystem}, {0, 11, 0x10000000, sidCreatorOwner}, {0, 0, 0x1200a9, "S-1-5-32-545"}, {0, 11, 0xa0000000, "S-1-5-32-545"}}}, ""},
	{"who installs", "O:S-1-5-21-1-2-3-1001D:(A;;FA;;;S-1-5-21-1-2-3-1001)",
		descriptor{owner: "S-1-5-21-1-2-3-1001", entries: []entry{{0, 0, 0x1f01ff, "S-1-5-21-1-2-3-1001"}}}, ""},
	{"owner's rights", "O:SYD:(A;;FA;;;OW)(A;;FA;;;CO)",
		descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x1f01ff, sidOwnerRights}, {0, 0, 0x1f01ff, sidCreatorOwner}}}, ""},
	{"another user's", "O:S-1-5-21-1-2-3-1002D:(A;;FA;;;SY)",
		descriptor{owner: "S-1-5-21-1-2-3-1002", entries: []entry{{0, 0, 0x1f01ff, sidSystem}}}, "it belongs to S-1-5-21-1-2-3-1002"},
	{"the creator's", "O:COD:(A;;FA;;;SY)",
		descriptor{owner: sidCreatorOwner, entries: []entry{{0, 0, 0x1f01ff, sidSystem}}}, "it belongs to S-1-3-0"},
	{"nobody's", "D:(A;;FA;;;SY)", descriptor{entries: []entry{{0, 0, 0x1f01ff, sidSystem}}}, "it belongs to nobody"},
	{"no list", "O:SY", descriptor{owner: sidSystem, noDACL: true}, "everybody may write to it"},
	{"nobody may", "O:SYD:", descriptor{owner: sidSystem}, ""},
	{"ProgramData", "O:SYD:(A;OICI;0x1200a9;;;BU)(A;CI;0x116;;;BU)",
		descriptor{owner: sidSystem, entries: []entry{{0, 3, 0x1200a9, "S-1-5-32-545"}, {0, 2, 0x116, "S-1-5-32-545"}}}, "Users may write to it (rights 0x116)"},
	{"one right: write", "O:SYD:(A;;0x2;;;WD)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x2, "S-1-1-0"}}}, "Everyone may write to it (rights 0x2)"},
	{"one right: append", "O:SYD:(A;;0x4;;;AU)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x4, "S-1-5-11"}}}, "Authenticated Users may write to it (rights 0x4)"},
	{"one right: delete child", "O:SYD:(A;;0x40;;;IU)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x40, "S-1-5-4"}}}, "INTERACTIVE may write to it (rights 0x40)"},
	{"one right: delete", "O:SYD:(A;;SD;;;WD)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x10000, "S-1-1-0"}}}, "Everyone may write to it (rights 0x10000)"},
	{"one right: rights", "O:SYD:(A;;WD;;;WD)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x40000, "S-1-1-0"}}}, "Everyone may write to it (rights 0x40000)"},
	{"one right: owner", "O:SYD:(A;;WO;;;WD)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x80000, "S-1-1-0"}}}, "Everyone may write to it (rights 0x80000)"},
	{"generic write", "O:SYD:(A;;GW;;;WD)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x40000000, "S-1-1-0"}}}, "Everyone may write to it (rights 0x40000000)"},
	{"generic all", "O:SYD:(A;;GA;;;S-1-5-21-1-2-3-1002)", descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x10000000, "S-1-5-21-1-2-3-1002"}}}, "S-1-5-21-1-2-3-1002 may write to it (rights 0x10000000)"},
	{"to read", "O:SYD:(A;;0x1200a9;;;WD)(A;;GR;;;AU)(A;;GX;;;BU)",
		descriptor{owner: sidSystem, entries: []entry{{0, 0, 0x1200a9, "S-1-1-0"}, {0, 0, 0x80000000, "S-1-5-11"}, {0, 0, 0x20000000, "S-1-5-32-545"}}}, ""},
	{"denied", "O:SYD:(D;;FA;;;WD)", descriptor{owner: sidSystem, entries: []entry{{1, 0, 0x1f01ff, "S-1-1-0"}}}, ""},
	{"denied, then allowed", "O:SYD:(D;;FA;;;AU)(A;;FA;;;AU)",
		descriptor{owner: sidSystem, entries: []entry{{1, 0, 0x1f01ff, "S-1-5-11"}, {0, 0, 0x1f01ff, "S-1-5-11"}}}, "Authenticated Users may write to it (rights 0x1f01ff)"},
	{"under a condition", "", descriptor{owner: sidSystem, entries: []entry{{9, 0, 0x1f01ff, "S-1-1-0"}}}, "Everyone may write to it (rights 0x1f01ff)"},
	{"denied under a condition", "", descriptor{owner: sidSystem, entries: []entry{{10, 0, 0x1f01ff, "S-1-1-0"}}}, ""},
	{"for an object", "", descriptor{owner: sidSystem, entries: []entry{{5, 0, 0, ""}}}, "it has an entry of rights of the unknown kind 5"},
}

func TestJudge(t *testing.T) {
	for _, c := range judged {
		if got := judge(c.d, "", "S-1-5-21-1-2-3-1001"); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if got := judge(descriptor{owner: "S-1-5-21-1-2-3-1001"}); got == "" {
		t.Error("who installs is trusted although nobody said so")
	}
}
