package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"hotpatchd/agent/control"
)

// Bounds of what is read: reports come from many devices, and any of them may lie.
const (
	maxReportFile = 256 << 20 // bytes of one file, which may hold many reports
	maxFleet      = 1_000_000 // devices
	maxInventory  = 64 << 20  // bytes
	maxDeviceID   = 64        // bytes
	maxDamaged    = 100       // complaints about what cannot be read
	maxCell       = 100       // runes of a text that is shown in a table
	shownDevices  = 20        // rows of devices that are not well, without --all
)

// verdict ends the command with an exit code and nothing on standard error: the
// answer has been given.
type verdict int

func (v verdict) Error() string { return fmt.Sprintf("exit code %d", int(v)) }

// Exit codes of a fleet, as of one device.
const (
	exitNotEligible verdict = 3
	exitIncomplete  verdict = 4
)

func fleetCommand() *cobra.Command {
	var (
		inventory, wanted string
		silent            time.Duration
		all, asJSON       bool
	)
	cmd := &cobra.Command{
		Use:   "fleet DIR|FILE...",
		Short: "tell from collected reports how a fleet stands",
		Long: `Reads reports that devices sent (hotpatch-report/1), or what "hotpatch status --json" printed there, one
document or many in each file, and *.json of each folder and below. Of each device the newest one counts.

Each targeted device is counted once: not reporting, not eligible, or eligible; and of the eligible ones
hotpatched, up to date (nothing applies), pending, incomplete, or fallen back to a restart. Where no image
is open and files are staged for a restart, the restart is due, which is counted beside that. The inventory
is a text file with one device id a line, and a name after it if you like; without it, who does not
report cannot be told.

Exit codes: 0 all targeted devices are well, 4 something is open or not heard of, or no report was found, 3 only devices that are not eligible.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := question{now: time.Now(), silent: silent, release: wanted}
			if silent <= 0 {
				return &usageError{errors.New("--silent must be more than 0s"), cmd.CommandPath()}
			}
			var err error
			if inventory != "" {
				if q.targeted, err = readInventory(inventory); err != nil {
					return err
				}
			}
			c := &collection{devices: map[string]*heard{}}
			for _, path := range args {
				if err := c.read(path); err != nil {
					return err
				}
			}
			if len(c.devices) == 0 && len(c.damaged) > 0 {
				return fmt.Errorf("nothing could be read: %s", c.damaged[0])
			}
			r := weigh(q, c.devices)
			r.document, r.Damaged = newDocument("hotpatch-fleet/1"), append(r.Damaged, c.damaged...)
			if asJSON {
				err = printJSON(cmd.OutOrStdout(), r)
			} else {
				err = printFleet(cmd.OutOrStdout(), cmd.ErrOrStderr(), r, inventory, silent, all)
			}
			if err != nil {
				return err
			}
			if len(c.devices) == 0 {
				fmt.Fprintf(cmd.ErrOrStderr(), "no report was found in %s: give the folder that your collector writes *.json to, or files of hotpatch status --json\n",
					cell(strings.Join(args, " ")))
			}
			return r.verdict()
		},
	}
	f := cmd.Flags()
	f.StringVar(&inventory, "inventory", "", "text file with the ids of the targeted devices")
	f.StringVar(&wanted, "release", "", "count as hotpatched only devices on which this release is in force")
	f.DurationVar(&silent, "silent", 72*time.Hour, "without a report for so long a device is not reporting")
	f.BoolVar(&all, "all", false, "list every device, not only the first that are not well")
	f.BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}

// verdict is the exit code that goes with the answer; nil: all is well.
func (r fleetReport) verdict() error {
	switch {
	case r.Targeted == 0: // of nobody nothing is known
		return exitIncomplete
	case r.NotReporting+r.Pending+r.Incomplete+r.Restart > 0, r.nobody():
		return exitIncomplete
	case r.NotEligible > 0:
		return exitNotEligible
	}
	return nil
}

// nobody: the release that was asked for is in force on no device that reports. It
// may be a slip of the pen, and nothing is known of it either way.
func (r fleetReport) nobody() bool {
	return r.Release != "" && !slices.ContainsFunc(r.Releases, func(c counted) bool { return c.ID == r.Release })
}

// readInventory reads ids and names; an id that stands there twice is a mistake
// that would hide a device.
func readInventory(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string]string{}
	lines := bufio.NewScanner(io.LimitReader(f, maxInventory))
	for n := 1; lines.Scan(); n++ {
		text, _, _ := strings.Cut(lines.Text(), "#")
		id, name, _ := strings.Cut(strings.TrimSpace(text), " ")
		id, tab, _ := strings.Cut(id, "\t")
		if name = strings.TrimSpace(tab + " " + name); id == "" {
			continue
		}
		if _, twice := out[id]; twice || len(id) > maxDeviceID {
			return nil, fmt.Errorf("%s:%d: %s stands there twice, or is no device id", path, n, cell(id))
		}
		if out[id] = name; len(out) > maxFleet {
			return nil, fmt.Errorf("%s: more than %d devices", path, maxFleet)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", path, err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s names no device", path)
	}
	return out, nil
}

// collection gathers the newest report of each device.
type collection struct {
	devices map[string]*heard
	damaged []string
}

// read takes in a file, or every *.json of a folder and below.
func (c *collection) read(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return c.file(path)
	}
	return filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || !strings.HasSuffix(p, ".json") || strings.HasPrefix(e.Name(), ".") {
			return err
		}
		return c.file(p)
	})
}

func (c *collection) file(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	d := json.NewDecoder(io.LimitReader(f, maxReportFile))
	for {
		var text json.RawMessage
		if err := d.Decode(&text); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			c.cannot("%s: no JSON at byte %d", path, d.InputOffset())
			return nil
		}
		if err := c.take(text); err != nil {
			c.cannot("%s: the document that ends at byte %d: %v", path, d.InputOffset(), err)
		}
		if len(c.devices) > maxFleet {
			return fmt.Errorf("more than %d devices", maxFleet)
		}
	}
}

// cannot keeps what could not be read, the first of them in words.
func (c *collection) cannot(format string, args ...any) {
	switch len(c.damaged) {
	case maxDamaged:
		c.damaged = append(c.damaged, "and more")
	case maxDamaged + 1:
	default:
		c.damaged = append(c.damaged, fmt.Sprintf(format, args...))
	}
}

// take takes in one document.
func (c *collection) take(text []byte) error {
	var head control.Header
	if err := json.Unmarshal(text, &head); err != nil {
		return errors.New("it is no report")
	}
	h := &heard{at: head.Generated.Time}
	switch head.Format {
	case control.FormatReport:
		var r control.Report
		if err := json.Unmarshal(text, &r); err != nil {
			return errors.New("it is no report")
		}
		h.status, h.eligibility, h.dropped = r.Status, &r.Eligibility, r.Dropped
	case control.FormatStatus:
		if err := json.Unmarshal(text, &h.status); err != nil {
			return errors.New("it is no status")
		}
	default:
		return fmt.Errorf("its format is %q, not %s or %s", cell(head.Format), control.FormatReport, control.FormatStatus)
	}
	h.id = h.status.Device.ID
	if h.id == "" || len(h.id) > maxDeviceID || h.at.IsZero() {
		return errors.New("it does not tell which device it is from, or when it was made")
	}
	if old := c.devices[h.id]; old == nil || h.at.After(old.at) {
		c.devices[h.id] = h
	}
	return nil
}

func printFleet(out, errOut io.Writer, r fleetReport, inventory string, silent time.Duration, all bool) error {
	well := r.Hotpatched + r.UpToDate
	head := "FLEET   %d of %d targeted devices are well\n\n"
	if !r.Inventory {
		head = "FLEET   %d of %d devices that report are well\n\n"
	}
	fmt.Fprintf(out, head, well, r.Targeted)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	line := func(name string, n int, text string) { fmt.Fprintf(w, "%s\t%6d\t%s\n", name, n, text) }
	if r.Inventory {
		line("targeted", r.Targeted, "in "+inventory)
		line("  not reporting", r.NotReporting, "not for "+span(silent))
	} else {
		line("reporting", r.Targeted-r.NotReporting, "give --inventory to tell who does not report")
		line("  silent", r.NotReporting, "not for "+span(silent))
	}
	line("  not eligible", r.NotEligible, list(r.Checks))
	line("  eligible", r.Eligible, "")
	by := ""
	if r.Release != "" {
		by = "by " + r.Release
	}
	line("    hotpatched", r.Hotpatched, by)
	line("    up to date", r.UpToDate, "nothing applies to them")
	line("    pending", r.Pending, "")
	line("    incomplete", r.Incomplete, "")
	line("    restart", r.Restart, "fell back to a restart")
	if r.nobody() {
		fmt.Fprintf(w, "not known\t\t%s is in force on no device that reports\n", r.Release)
	}
	if r.RestartDue > 0 {
		line("restart due", r.RestartDue, "no image is open on them; staged files take effect at a restart")
	}
	if n := len(r.NotTargeted); n > 0 {
		line("not targeted", n, "report, and are not in the inventory: "+cell(strings.Join(r.NotTargeted, " ")))
	}
	line("images", r.Images, fmt.Sprintf("%d of them run fixed code", r.Patched))
	if r.Dropped > 0 {
		fmt.Fprintf(w, "lost reports\t%6d\tdevices could not deliver them\n", r.Dropped)
	}
	if len(r.Releases) > 0 {
		fmt.Fprintf(w, "\nRELEASE\tDEVICES\tPRODUCT\n")
		for _, x := range r.Releases {
			fmt.Fprintf(w, "%s\t%6d\t%s\n", cell(x.ID), x.Devices, cell(x.Product))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := printDevices(out, r, all); err != nil {
		return err
	}
	for _, d := range r.Damaged {
		fmt.Fprintf(errOut, "warning: %s\n", cell(d))
	}
	return nil
}

func printDevices(out io.Writer, r fleetReport, all bool) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	shown, more := 0, 0
	for _, d := range r.Devices {
		if !all && (d.Class == hotpatched || d.Class == upToDate) {
			continue
		}
		if !all && shown == shownDevices {
			more++
			continue
		}
		if shown == 0 {
			fmt.Fprintf(w, "\nDEVICE\tNAME\tIS\tREPORTED\tWHY\n")
		}
		shown++
		at := "never"
		if !d.Reported.IsZero() {
			at = day(d.Reported.Time)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", cell(d.ID), cell(d.Name), d.Class, at, cell(d.Why))
	}
	if more > 0 {
		fmt.Fprintf(w, "and %d more: --all\n", more)
	}
	return w.Flush()
}

// list is "baseline 3, vbs 2".
func list(all []counted) string {
	var out []string
	for _, x := range all {
		out = append(out, fmt.Sprintf("%s %d", x.ID, x.Devices))
	}
	return cell(strings.Join(out, ", "))
}

// span is a duration as people say it.
func span(d time.Duration) string {
	if d >= 48*time.Hour && d%(24*time.Hour) == 0 {
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	}
	s := d.String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, zero) {
			s = s[:len(s)-2]
		}
	}
	return s
}

// cell makes text of a stranger fit into a table: one line, nothing that a
// terminal would obey, and not too long.
func cell(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsSpace(r) {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
	if r := []rune(s); len(r) > maxCell {
		return string(r[:maxCell-1]) + "…"
	}
	return s
}
