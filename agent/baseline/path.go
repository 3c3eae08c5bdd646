package baseline

import (
	"fmt"
	"path"
	"strings"
	"unicode/utf8"
)

// maxPath bounds a destination, in bytes.
const maxPath = 1024

// reserved are names that Windows takes for devices, whatever their extension
// (Microsoft, "Naming Files, Paths, and Namespaces").
var reserved = map[string]bool{"con": true, "prn": true, "aux": true, "nul": true, "conin$": true, "conout$": true, "clock$": true}

func init() {
	for _, d := range "0123456789¹²³" {
		reserved["com"+string(d)], reserved["lpt"+string(d)] = true, true
	}
}

// metadata are the files that NTFS keeps about itself in the root of a drive
// (Microsoft, "Master File Table"); the others of them lie in $Extend.
var metadata = map[string]bool{"$mft": true, "$mftmirr": true, "$logfile": true, "$volume": true, "$attrdef": true, "$bitmap": true,
	"$boot": true, "$badclus": true, "$secure": true, "$upcase": true, "$extend": true}

// forbidden are folders of Linux whose files are the kernel's.
var forbidden = []string{"/proc", "/sys"}

// CheckUnix tells whether s may be a destination on Linux, by its spelling alone.
func CheckUnix(s string) error {
	switch {
	case len(s) > maxPath:
		return fmt.Errorf("the path has %d bytes, more than %d", len(s), maxPath)
	case !strings.HasPrefix(s, "/") || path.Clean(s) != s || s == "/":
		return fmt.Errorf("%q is not an absolute path without . and ..", s)
	case strings.ContainsAny(s, "\x00\n") || !utf8.ValidString(s):
		return fmt.Errorf("%q has characters that no destination may have", s)
	}
	if strings.Contains(path.Base(s), ".hotpatch-") {
		return fmt.Errorf("%q is a name of ours", s)
	}
	return nil
}

// CheckWindows tells whether s may be a destination on Windows: a drive, then
// plain names.
func CheckWindows(s string) error {
	if len(s) > maxPath {
		return fmt.Errorf("the path has %d bytes, more than %d", len(s), maxPath)
	}
	if len(s) < 4 || !letter(s[0]) || s[1] != ':' || s[2] != '\\' || !utf8.ValidString(s) {
		return fmt.Errorf("%q is not an absolute path like C:\\Program Files\\Acme\\app.dll", s)
	}
	for i, name := range strings.Split(s[3:], `\`) {
		stem, _, _ := strings.Cut(name, ".")
		switch {
		case name == "" || name == "." || name == "..":
			return fmt.Errorf("%q is not a path without . and ..", s)
		case strings.ContainsAny(name, `/:*?"<>|`) || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' }):
			return fmt.Errorf("%q has characters that no destination may have", s)
		case strings.HasSuffix(name, ".") || strings.HasSuffix(name, " "):
			return fmt.Errorf("%q has a name that ends with a dot or a blank", s)
		case reserved[strings.ToLower(strings.TrimRight(stem, " "))]:
			return fmt.Errorf("%q has the name of a device", s)
		case i == 0 && metadata[strings.ToLower(name)]:
			return fmt.Errorf("%q is the file system's own", s)
		}
	}
	if strings.Contains(s[strings.LastIndexByte(s, '\\'):], ".hotpatch-") {
		return fmt.Errorf("%q is a name of ours", s)
	}
	return nil
}

func letter(c byte) bool { return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' }

// inForbidden names the folder that s lies in and may not; "" if it lies elsewhere.
func inForbidden(s string) string {
	for _, f := range forbidden {
		if s == f || strings.HasPrefix(s, f+"/") {
			return f
		}
	}
	return ""
}
