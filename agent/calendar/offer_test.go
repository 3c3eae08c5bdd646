package calendar

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const day = 24 * time.Hour

// rows reads a table of testdata: fields between blanks, # begins a comment.
func rows(t *testing.T, name string, least int) [][]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	var out [][]string
	for n, line := range strings.Split(string(b), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) < least {
			t.Fatalf("%s:%d: %d fields", name, n+1, len(f))
		}
		out = append(out, append(f, "", ""))
	}
	return out
}

func known(s string) string {
	if s == "-" {
		return ""
	}
	return s
}

func number(t *testing.T, s string) int {
	t.Helper()
	if known(s) == "" {
		return 0
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func releaseDay(t *testing.T, s string) time.Time {
	t.Helper()
	d, err := time.Parse("2006-01-02", s)
	if err != nil {
		t.Fatal(err)
	}
	return ReleaseOn(d.Year(), d.Month(), d.Day())
}

// published reads a track of testdata.
func published(t *testing.T, name string) *Track {
	t.Helper()
	var out []Update
	for _, f := range rows(t, name, 6) {
		m, err := ParseMonth(f[0])
		if err != nil {
			t.Fatal(err)
		}
		u := Update{Kind: Kind(f[1]), Month: m, Date: releaseDay(t, f[2]), ID: known(f[3]), UBR: number(t, f[5]), OutOfBand: f[6] == "out-of-band"}
		for _, b := range strings.Split(f[4], ",") {
			u.Builds = append(u.Builds, number(t, b))
		}
		if u.Kind != Baseline && u.Kind != Hotpatch && u.Kind != Standard || f[6] != "" && !u.OutOfBand {
			t.Fatalf("%s: %v", name, f)
		}
		out = append(out, u)
	}
	return NewTrack(name, out)
}

var tracks = []string{"windows-11", "windows-server-2022", "windows-server-2025"}

// Planned updates came on the day the rule says, baselines in their months, but
// for the two unplanned ones.
func TestRuleAgreesWithWhatWasPublished(t *testing.T) {
	unplanned := map[string]bool{"windows-11 2026-06": true, "windows-server-2022 2024-08": true}
	months := 0
	for _, name := range tracks {
		for _, u := range published(t, name).updates {
			if u.OutOfBand {
				if u.Date.Equal(u.Month.Release()) {
					t.Errorf("%s: %s came on the planned day", name, u.name())
				}
				continue
			}
			if !u.Date.Equal(u.Month.Release()) {
				t.Errorf("%s: %s came %s, planned was %s", name, u.name(), u.Date, u.Month.Release())
			}
			if u.Kind == Standard {
				continue
			}
			months++
			if planned := u.Month.Planned() == u.Kind; planned == unplanned[name+" "+u.Month.String()] {
				t.Errorf("%s: %s, planned %s", name, u.name(), u.Month.Planned())
			}
		}
	}
	if months != 24+29+21 {
		t.Errorf("%d months", months)
	}
}

// deviceAt is a device that has an update, false if nothing known tells it.
func deviceAt(u Update, build int) (Device, bool) {
	d := Device{Build: build, Enrolled: true}
	switch {
	case u.UBR > 0:
		d.UBR = u.UBR
	case u.ID != "":
		d.ID = u.ID
	default:
		return d, false
	}
	return d, true
}

// Every published row, for a device at every level: on the track, behind, off
// it; before, at and after the release. What is wanted is worked out here from
// the neighbours in the table alone.
func TestEveryRow(t *testing.T) {
	tried := 0
	for _, name := range tracks {
		track := published(t, name)
		for i, u := range track.updates {
			build := u.Builds[0]
			var line []Update // baselines and planned and other hotpatches before u
			for _, x := range track.updates[:i] {
				if x.Kind != Standard {
					line = append(line, x)
				}
			}
			wantAt := func(what string, has Update, at time.Time, kind Kind, id string, codes ...Code) {
				t.Helper()
				d, ok := deviceAt(has, build)
				if !ok {
					return
				}
				tried++
				got := Offered(track, d, at)
				good := got.Kind == kind && got.Update.ID == id && got.Restart == (kind == Baseline || kind == Standard)
				code := len(codes) == 0
				for _, c := range codes {
					code = code || got.Code == c
				}
				if !good || !code || got.Text == "" {
					t.Errorf("%s: %s, device with %s on %s: %+v, wanted %s %q", name, what, has.name(), at.Format(time.DateOnly), got, kind, id)
				}
			}
			// The device that took it has nothing to do, until something new is out.
			next := u.Date.Add(30 * day)
			for _, x := range track.updates[i+1:] {
				if x.Date.After(u.Date) {
					next = x.Date
					break
				}
			}
			mine := CodeCurrent
			if u.Kind == Standard {
				mine = CodeOffTrack
			}
			for _, at := range []time.Time{u.Date, u.Date.Add(time.Second), next.Add(-time.Second)} {
				wantAt("it has it", u, at, Nothing, "", mine)
			}
			// The one that had what came before on the track.
			if len(line) > 0 && u.Kind != Standard {
				before := line[len(line)-1]
				wantAt("the second before", before, u.Date.Add(-time.Second), Nothing, "", CodeCurrent)
				code := CodeHotpatch
				if u.Kind == Baseline {
					code = CodeBaseline
				}
				for _, at := range []time.Time{u.Date, u.Date.Add(2 * day)} {
					wantAt("the next", before, at, u.Kind, u.ID, code)
				}
			}
			// All older baselines' devices never get a hotpatch.
			bases := 0
			for j := len(line) - 1; j >= 0 && u.Kind == Hotpatch; j-- {
				if bases > 0 {
					if d, ok := deviceAt(line[j], build); ok {
						tried++
						if got := Offered(track, d, u.Date); got.Kind == Hotpatch || got.Code != CodeBaseline || !got.Restart {
							t.Errorf("%s: %s, %s at its release: %+v", name, u.name(), line[j].name(), got)
						}
					}
				}
				if line[j].Kind == Baseline {
					bases++
				}
			}
			// Off the track since this one: no hotpatch, but the next baseline.
			if d, ok := deviceAt(u, build); ok && u.Kind == Standard {
				for _, x := range track.updates[i+1:] {
					got := Offered(track, d, x.Date)
					tried++
					if x.Kind == Baseline {
						if got.Kind != Baseline || got.Update.ID != x.ID || !got.Until.IsZero() {
							t.Errorf("%s: off the track at %s, %s is out: %+v", name, u.name(), x.name(), got)
						}
						break
					}
					if got.Kind == Hotpatch || got.OnTrack || got.Until.IsZero() || MonthOf(got.Until).Planned() != Baseline {
						t.Errorf("%s: off the track at %s, %s is out: %+v", name, u.name(), x.name(), got)
					}
				}
			}
		}
	}
	if tried < 600 {
		t.Errorf("only %d decisions were looked at", tried)
	}
	t.Logf("%d decisions", tried)
}

// TestCases are single situations, written down one by one.
func TestCases(t *testing.T) {
	for _, f := range rows(t, "cases", 7) {
		track := published(t, f[0])
		at := releaseDay(t, f[1][:10])
		switch f[1][10:] {
		case "":
		case "-1s":
			at = at.Add(-time.Second)
		case "+7d":
			at = at.Add(7 * day)
		default:
			t.Fatal(f)
		}
		var d Device
		if build, ubr, ok := strings.Cut(f[2], "."); ok {
			d.Build, d.UBR = number(t, build), number(t, ubr)
		} else {
			d.Build, d.ID = 26100, f[2]
		}
		how, upgraded, _ := strings.Cut(f[3], ",upgraded=")
		if upgraded != "" {
			d.Upgraded = releaseDay(t, upgraded)
		}
		if d.Enrolled = how == "enrolled"; !d.Enrolled && how != "ordinary" {
			t.Fatal(f)
		}
		got := Offered(track, d, at)
		if s := fmt.Sprint(got.Kind, " ", cmp.Or(got.Update.ID, "-"), " ", got.Code); s != strings.Join(f[4:7], " ") {
			t.Errorf("%s\n got %s: %s", strings.Join(f, " "), s, got.Text)
		}
	}
}

// What a month brings, and what is next, is judged by what is out at that instant.
func TestUnplannedBaselineTakesAPlace(t *testing.T) {
	june, july, august := Month{2026, time.June}, Month{2026, time.July}, Month{2026, time.August}
	early := june.Release().Add(-5 * day)
	track := NewTrack("", []Update{
		{ID: "O", Kind: Baseline, Month: june, Date: early.Add(-day), OutOfBand: true},
		{ID: "B", Kind: Baseline, Month: june, Date: early},
	})
	for _, c := range []struct {
		at             time.Time
		kind           Kind
		next, baseline time.Time
		published      int
	}{
		{early.Add(-2 * day), Hotpatch, june.Release(), july.Release(), 0},
		{early.Add(-time.Second), Hotpatch, june.Release(), july.Release(), 1},
		{early, Baseline, august.Release(), july.Release(), 2},
		{june.Release(), Baseline, august.Release(), july.Release(), 2},
	} {
		if got := track.Kind(june, c.at); got != c.kind {
			t.Errorf("%s: june is %s", c.at, got)
		}
		if got := track.Next(Hotpatch, c.at); !got.Equal(c.next) {
			t.Errorf("%s: hotpatch %s", c.at, got)
		}
		if got := track.Next(Baseline, c.at); !got.Equal(c.baseline) {
			t.Errorf("%s: baseline %s", c.at, got)
		}
		if got := len(track.Published(june, c.at)); got != c.published {
			t.Errorf("%s: %d updates", c.at, got)
		}
	}
}
