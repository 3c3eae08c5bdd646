package agent

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Denied finds the first rule that forbids touching an image of a process. An
// empty image asks about the process as a whole.
func (p *Policy) Denied(exe, user, image string) (Denial, bool) {
	for _, d := range p.Deny {
		if d.Match(exe, user, image) {
			return d, true
		}
	}
	return Denial{}, false
}

// DenialKind is what a rule of "deny" looks at.
type DenialKind string

const (
	DenyExe   DenialKind = "exe"   // the process's program: its PE path or name
	DenyUser  DenialKind = "user"  // the process's owner
	DenyImage DenialKind = "image" // the image's path or name
)

// Denial is one rule of "deny".
type Denial struct {
	Kind DenialKind
	Glob Glob
}

// parseDenial reads "exe:GLOB", "user:GLOB", "image:GLOB" or "GLOB", which means
// exe. One letter before a colon is a drive.
func parseDenial(text string) (Denial, error) {
	kind, glob, ok := strings.Cut(text, ":")
	if !ok || len(kind) < 2 || strings.ContainsAny(kind, `/\*?.`) {
		kind, glob = string(DenyExe), text
	}
	d := Denial{Kind: DenialKind(kind), Glob: Glob(glob)}
	switch d.Kind {
	case DenyExe, DenyUser, DenyImage:
		return d, d.Glob.valid()
	}
	return Denial{}, fmt.Errorf("%q is none of exe:, user:, image:", kind+":")
}

func (d Denial) String() string { return string(d.Kind) + ":" + string(d.Glob) }

// Match tells whether the rule forbids. Paths and names are as the process has
// them; either may be given.
func (d Denial) Match(exe, user, image string) bool {
	switch d.Kind {
	case DenyUser:
		return d.Glob.Match(user)
	case DenyImage:
		return image != "" && d.Glob.Match(image)
	}
	return d.Glob.Match(exe)
}

// Glob is a pattern for paths and names: * stands for any run of characters,
// folders included, ? for one. Upper and lower case, and / and \, are the same:
// Windows' names are, and a rule that forbids too much is noticed, one that
// forbids too little is not. It matches a whole path or its last element.
type Glob string

func (g Glob) valid() error {
	switch {
	case g == "":
		return errors.New("the pattern is empty")
	case len(g) > maxGlob:
		return fmt.Errorf("the pattern is longer than %d bytes", maxGlob)
	case !utf8.ValidString(string(g)):
		return errors.New("the pattern is not UTF-8")
	}
	return nil
}

// Match tells whether path, or its last element, fits the pattern.
func (g Glob) Match(path string) bool {
	pattern, name := fold(string(g)), fold(path)
	if wild(pattern, name) {
		return true
	}
	i := strings.LastIndexByte(name, '/')
	return i >= 0 && wild(pattern, name[i+1:])
}

// MatchAny tells whether one of the patterns matches.
func MatchAny(globs []Glob, path string) bool {
	for _, g := range globs {
		if g.Match(path) {
			return true
		}
	}
	return false
}

// fold makes equal what is the same file: \\?\C:\A and c:/a.
func fold(s string) string {
	s = strings.ToLower(strings.ReplaceAll(s, `\`, "/"))
	for _, prefix := range []string{"//?/", "/??/", "//./"} {
		s = strings.TrimPrefix(s, prefix)
	}
	return s
}

// wild matches with * and ?. It never takes more than len(pattern)·len(name)
// steps: only the last * is ever tried again.
func wild(pattern, name string) bool {
	p, n, star, mark := 0, 0, -1, 0
	for n < len(name) {
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, n
			p++
			continue
		}
		if p < len(pattern) && pattern[p] == '?' {
			_, size := utf8.DecodeRuneInString(name[n:])
			p, n = p+1, n+size
			continue
		}
		if p < len(pattern) && pattern[p] == name[n] {
			p, n = p+1, n+1
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, n = star+1, mark
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// globs checks a list of patterns; a key that is not in the file is the default.
func (d *document) globs(key string, texts []string, fallback []Glob) ([]Glob, error) {
	if !d.set(key) {
		return fallback, nil
	}
	if len(texts) > maxGlobs {
		return nil, d.errorf(key, "has %d entries, at most %d are read", len(texts), maxGlobs)
	}
	globs := []Glob{}
	for i, text := range texts {
		g := Glob(text)
		if err := g.valid(); err != nil {
			return nil, d.errorf(fmt.Sprintf("%s[%d]", key, i), "%s", err)
		}
		globs = append(globs, g)
	}
	return globs, nil
}
