package main

import (
	"fmt"
	"time"

	"hotpatchd/agent/control"
)

// starts is how soon programs that start are patched: the longest that an image
// of theirs may have been in memory before.
func starts(l control.Latency) string {
	every := (time.Duration(l.ScanEveryMS) * time.Millisecond).String()
	found := "found by a look every " + every
	text := ""
	switch {
	case l.Watch == "": // an older daemon
		return ""
	case l.Watch == control.WatchScan:
		if l.Count == 0 {
			return found + ": " + l.Why
		}
		text = found + "; "
	case l.Count == 0:
		text = "noticed at once; no new program had to be patched yet"
	}
	if l.Count > 0 {
		text += fmt.Sprintf("half of the new programs were patched within %s of loading an image, 99 of 100 within %s (%d measured)", millis(l.P50MS), millis(l.P99MS), l.Count)
	}
	if l.Late.Count > 0 { // the regular pass finds them
		text += fmt.Sprintf("; half of the images loaded later within %s, 99 of 100 within %s (%d)", millis(l.Late.P50MS), millis(l.Late.P99MS), l.Late.Count)
	}
	return text
}

// millis says milliseconds as finely as matters to people.
func millis(ms float64) string {
	d := time.Duration(ms * float64(time.Millisecond))
	if d >= time.Second {
		return d.Round(100 * time.Millisecond).String()
	}
	return max(d.Round(time.Millisecond), time.Millisecond).String()
}
