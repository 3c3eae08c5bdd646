package control

import "testing"

// TestSIDNumber: the numbers are written down elsewhere too, in histories.
func TestSIDNumber(t *testing.T) {
	seen := map[int]string{}
	for sid, want := range map[string]int{
		// Printed by: printf %s SID | sha256sum | cut -c1-13
		"S-1-5-18":                    0x593347bdfcc9b,
		"S-1-5-21-1-2-3-1001":         0xc169ebe52e9c0,
		"S-1-5-21-1-2-3-1002":         0xbf923dcfaa98b,
		"S-1-12-1-1111-2222-3333-444": 0xd116679d5414e,
	} {
		got := SIDNumber(sid)
		if got != want || got < 1 || got >= 1<<52 || seen[got] != "" {
			t.Errorf("%s: %d (%#x), want %#x", sid, got, got, want)
		}
		seen[got] = sid
	}
}
