package main

import "testing"

func TestIsExport(t *testing.T) {
	record := "PK\x03\x04" + string(make([]byte, 26))
	for b, want := range map[string]bool{
		record + "export.json{}": true, record + "release.json{}": false, record: false, "": false, record[:20]: false,
		"XX" + record[2:] + "export.json": false,
	} {
		if isExport([]byte(b)) != want {
			t.Errorf("%q: %v", b, !want)
		}
	}
}
