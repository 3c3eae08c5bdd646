package release

import (
	"encoding/json"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"hotpatchd/pe"
)

var (
	monthPattern    = regexp.MustCompile(`^[0-9]{4}-(0[1-9]|1[0-2])$`)
	wordPattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	sha256Pattern   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	rsdsPattern     = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}/[0-9]{1,10}$`)
	severityPattern = regexp.MustCompile(`^[a-z-]{0,32}$`)
	cvePattern      = regexp.MustCompile(`^CVE-[0-9]{4}-[0-9]{4,19}$`) // CVE Record Format 5, cveId
	entryPattern    = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.+@~-]*$`)
)

// Severities are the words for severity, worst first; "" says nothing.
var Severities = []string{"critical", "important", "moderate", "low"}

// machines maps IMAGE_FILE_MACHINE_* (PE specification, machine types) to Go's words.
var machines = map[uint16]string{0x8664: "amd64", 0xaa64: "arm64"}

// ArchOf is the architecture of a PE machine type, "" for one that no release is for.
func ArchOf(machine uint16) string { return machines[machine] }

// Check tells whether the manifest keeps every rule of the format. Errors name
// the release and the field.
func (m *Manifest) Check() error {
	if !ValidID(m.ID) {
		return fmt.Errorf("release id %q is not 1 to 64 letters, digits, dots, dashes or underscores that begin with a letter or digit", clip(m.ID))
	}
	if err := m.check(); err != nil {
		return fmt.Errorf("release %s: %w", m.ID, err)
	}
	return nil
}

func (m *Manifest) check() error {
	switch {
	case m.Format != Format:
		return fmt.Errorf("format is %q, not %q", clip(m.Format), Format)
	case !ValidID(m.Product):
		return fmt.Errorf("product %q is not 1 to 64 letters, digits, dots, dashes or underscores", clip(m.Product))
	case m.Kind != KindHotpatch && m.Kind != KindBaseline:
		return fmt.Errorf("kind is %q, not %q or %q", clip(m.Kind), KindHotpatch, KindBaseline)
	case m.Month != "" && !monthPattern.MatchString(m.Month):
		return fmt.Errorf("month is %q, not YYYY-MM", clip(m.Month))
	case m.Baseline != "" && !ValidID(m.Baseline):
		return fmt.Errorf("baseline %q is not 1 to 64 letters, digits, dots, dashes or underscores", clip(m.Baseline))
	case m.Kind == KindHotpatch && m.Sequence == 0:
		return fmt.Errorf("sequence is 0: a hotpatch counts from 1")
	case !severityPattern.MatchString(m.Severity):
		return fmt.Errorf("severity %q is not one lower-case word", clip(m.Severity))
	case m.Consistency != ConsistencyEntry && m.Consistency != ConsistencyQuiescent:
		return fmt.Errorf("consistency is %q, not %q or %q", clip(m.Consistency), ConsistencyEntry, ConsistencyQuiescent)
	case m.Unwind != UnwindNone && m.Unwind != UnwindRequired:
		return fmt.Errorf("unwind is %q, not %q or %q", clip(m.Unwind), UnwindNone, UnwindRequired)
	}
	for _, t := range []struct {
		field, value string
		most         int
	}{
		{"title", m.Title, MaxTitle}, {"os_build", m.OSBuild, MaxTitle},
		{"requires.min_build", m.Requires.MinBuild, MaxTitle}, {"support_url", m.SupportURL, MaxPath},
	} {
		if err := checkText(t.value, t.most); err != nil {
			return fmt.Errorf("%s %w", t.field, err)
		}
	}
	if err := checkURL(m.SupportURL); err != nil {
		return err
	}
	for _, l := range []struct {
		field string
		list  []string
		valid func(string) bool
	}{
		{"cves", m.CVEs, ValidID}, {"requires.os", m.Requires.OS, wordPattern.MatchString},
		{"requires.arch", m.Requires.Arch, wordPattern.MatchString}, {"requires.features", m.Requires.Features, wordPattern.MatchString},
	} {
		if len(l.list) > MaxList {
			return fmt.Errorf("%s has %d entries, more than %d", l.field, len(l.list), MaxList)
		}
		for i, s := range l.list {
			if !l.valid(s) || slices.Contains(l.list[:i], s) {
				return fmt.Errorf("%s[%d] is %q: not one word, or there twice", l.field, i, clip(s))
			}
		}
	}
	if err := m.checkInfo(); err != nil {
		return err
	}
	return m.checkContents()
}

// CheckLabels tells whether severity and CVEs are words that people and their
// tools know. Reading a release does not ask: a fix is not worse for its labels.
func (m *Manifest) CheckLabels() error {
	if m.Severity != "" && !slices.Contains(Severities, m.Severity) {
		return fmt.Errorf("release %s: severity is %q, not one of %s", m.ID, clip(m.Severity), strings.Join(Severities, ", "))
	}
	for i, s := range m.CVEs {
		if !cvePattern.MatchString(s) {
			return fmt.Errorf("release %s: cves[%d] is %q, not CVE-YYYY-NNNN", m.ID, i, clip(s))
		}
	}
	return nil
}

func (m *Manifest) checkInfo() error {
	b, err := json.Marshal(m.Info)
	if err != nil {
		return fmt.Errorf("info cannot be written as JSON: %w", err)
	}
	if len(b) > MaxInfo {
		return fmt.Errorf("info has %d bytes, more than %d", len(b), MaxInfo)
	}
	return nil
}

// checkContents checks images and files, and that no two share an entry of the container.
func (m *Manifest) checkContents() error {
	if m.Kind == KindHotpatch && len(m.Images) == 0 {
		return fmt.Errorf("kind hotpatch has images; here are none")
	}
	if m.Kind == KindBaseline && (len(m.Files) == 0 || len(m.Images) != 0) {
		return fmt.Errorf("kind baseline has files and no images; here are %d and %d", len(m.Files), len(m.Images))
	}
	if n := len(m.Images) + len(m.Files); n > MaxImages {
		return fmt.Errorf("%d images or files, more than %d", n, MaxImages)
	}
	entries := map[string]bool{}
	bases := map[string]bool{}
	var total int64
	for i := range m.Images {
		image := &m.Images[i]
		if err := image.check(); err != nil {
			return fmt.Errorf("images[%d] %w", i, err)
		}
		if err := claim(entries, image.File); err != nil {
			return fmt.Errorf("images[%d] %w", i, err)
		}
		b := image.Base
		key := fmt.Sprintf("%s %d %d %d %s %s", strings.ToLower(image.Name), b.Machine, b.SizeOfImage, b.TimeDateStamp, b.RSDS, b.TextSHA256)
		if bases[key] {
			return fmt.Errorf("images[%d] is for the same build of %s as another image", i, image.Name)
		}
		bases[key] = true
		total += image.Size
	}
	places := map[string]bool{}
	for i := range m.Files {
		file := &m.Files[i]
		if err := file.check(); err != nil {
			return fmt.Errorf("files[%d] %w", i, err)
		}
		if err := claim(entries, file.File); err != nil {
			return fmt.Errorf("files[%d] %w", i, err)
		}
		if key := strings.ToLower(file.Destination); places[key] {
			return fmt.Errorf("files[%d] destination %q is there twice", i, clip(file.Destination))
		} else {
			places[key] = true
		}
		total += file.Size
	}
	if total > MaxExpanded-MaxManifest {
		return fmt.Errorf("images and files have %d bytes together, more than %d", total, MaxExpanded-MaxManifest)
	}
	return nil
}

// claim refuses a name twice, also where only case differs: Windows cannot tell them apart.
func claim(entries map[string]bool, name string) error {
	key := strings.ToLower(name)
	if entries[key] {
		return fmt.Errorf("file %q is there twice", name)
	}
	entries[key] = true
	return nil
}

func (i *Image) check() error {
	if err := checkFileName(i.Name); err != nil {
		return fmt.Errorf("name %w", err)
	}
	if err := checkEntry(i.File, "images/"); err != nil {
		return err
	}
	if err := checkContent(i.Size, MaxImage, i.SHA256); err != nil {
		return err
	}
	if arch := ArchOf(i.Base.Machine); arch == "" || arch != i.Arch {
		return fmt.Errorf("arch is %q, but base.machine %d is %q: amd64 (34404) and arm64 (43620) can be patched", clip(i.Arch), i.Base.Machine, arch)
	}
	return CheckBase(i.Base)
}

// CheckBase tells whether an identity is enough to tell one build from every other.
func CheckBase(b pe.Identity) error {
	switch {
	case b.SizeOfImage == 0:
		return fmt.Errorf("base.size_of_image is 0")
	case b.RSDS != "" && !rsdsPattern.MatchString(b.RSDS):
		return fmt.Errorf("base.rsds %q is not GUID/age in lower-case letters", clip(b.RSDS))
	case b.TextSHA256 != "" && !sha256Pattern.MatchString(b.TextSHA256):
		return fmt.Errorf("base.text_sha256 %q is not 64 lower-case hexadecimal digits", clip(b.TextSHA256))
	case b.TextSHA256 == "" && (b.TimeDateStamp == 0 || b.RSDS == ""):
		return fmt.Errorf("base.text_sha256 is missing: without time stamp and RSDS it alone tells builds apart")
	}
	return nil
}

func (f *File) check() error {
	if err := checkText(f.Destination, MaxPath); err != nil {
		return fmt.Errorf("destination %w", err)
	}
	if f.Destination == "" {
		return fmt.Errorf("destination is missing")
	}
	if err := checkDestination(f.Destination); err != nil {
		return err
	}
	if err := checkEntry(f.File, "files/"); err != nil {
		return err
	}
	if len(f.Replaces) > MaxList {
		return fmt.Errorf("replaces has %d entries, more than %d", len(f.Replaces), MaxList)
	}
	for i, sum := range f.Replaces {
		if !sha256Pattern.MatchString(sum) {
			return fmt.Errorf("replaces[%d] %q is not 64 lower-case hexadecimal digits", i, clip(sum))
		}
	}
	if f.Identity != nil {
		if ArchOf(f.Identity.Machine) == "" {
			return fmt.Errorf("identity has the machine %d, which no release is for", f.Identity.Machine)
		}
		if err := CheckBase(*f.Identity); err != nil {
			return fmt.Errorf("identity: %w", err)
		}
	}
	return checkContent(f.Size, MaxFile, f.SHA256)
}

// checkDestination: an absolute path of Linux or of Windows, without a way out.
// What else a device asks of it, it knows better.
func checkDestination(s string) error {
	unix := strings.HasPrefix(s, "/") && s != "/" && path.Clean(s) == s
	windows := len(s) > 3 && s[1:3] == `:\` && !strings.ContainsAny(s, "/") && !slices.ContainsFunc(strings.Split(s[3:], `\`), func(name string) bool {
		return name == "" || name == "." || name == ".."
	})
	if !unix && !windows {
		return fmt.Errorf("destination %q is not an absolute path without . and ..", clip(s))
	}
	return nil
}

func checkContent(size, most int64, sha string) error {
	if size < 1 || size > most {
		return fmt.Errorf("size is %d, not 1 to %d", size, most)
	}
	if !sha256Pattern.MatchString(sha) {
		return fmt.Errorf("sha256 %q is not 64 lower-case hexadecimal digits", clip(sha))
	}
	return nil
}

// checkEntry accepts prefix and one plain name: no way out of a folder, no
// drive, stream or device of any system can be spelled with it.
func checkEntry(name, prefix string) error {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok || len(name) > MaxName || path.Clean(name) != name || !entryPattern.MatchString(rest) {
		return fmt.Errorf("file %q is not %s and one plain name", clip(name), prefix)
	}
	return nil
}

func checkFileName(s string) error {
	if s == "" || s == "." || s == ".." || len(s) > MaxName || strings.ContainsAny(s, `/\:`) {
		return fmt.Errorf("%q is not the name of a file", clip(s))
	}
	return checkText(s, MaxName)
}

func checkURL(s string) error {
	if s == "" {
		return nil
	}
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return fmt.Errorf("support_url %q is not an http or https address", clip(s))
	}
	return nil
}

// checkText refuses what could fool a reader at a terminal: control
// characters and those that turn the direction of writing.
func checkText(s string, most int) error {
	if len(s) > most {
		return fmt.Errorf("has %d bytes, more than %d", len(s), most)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("is not UTF-8")
	}
	for i, r := range s {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) || r == '\u2028' || r == '\u2029' {
			return fmt.Errorf("has the control character %U at byte %d", r, i)
		}
	}
	return nil
}
