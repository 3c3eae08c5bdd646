package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"hotpatchd/agent/control"
	"hotpatchd/patcher/target/sim"
	"hotpatchd/pe"
)

// A scenario is a text file that drives the whole agent over a simulated
// machine, a real state, a real repository and a real control socket. It is a
// txtar archive:
//
//	comment        what it shows
//	scene.toml     the machine (package sim); $(FILE!EXPORT+N) is an offset in an image
//	policy.toml    the owner's policy; without it the device is simply enrolled
//	script         one command a line
//	*.toml         further policies, for "policy FILE"
//
// A command that begins with ! must fail; "error WORDS" then tells of what.
// What a command expects it waits for. Every scenario ends with the invariant
// of every process and the history's chain.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/scenarios/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatal("no scenarios", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if text := string(b); runtime.GOOS == "windows" && strings.Contains(text, "\nplace ") && strings.Contains(text, "\nreboot") {
				t.Skip("files are put into place at a restart: Windows does it itself while it starts (package baseline tries that)")
			}
			runScenario(t, file, txtar.Parse(b))
		})
	}
}

// script is one scenario under way.
type script struct {
	*rig
	sections map[string]string
	labels   map[string]int // names of processes whose pid the machine chose
	traces   map[string]*trace
	kept     []byte          // by "keep"
	change   *control.Change // outcome of the last command that changes things
	failure  error           // of the last command that began with !
}

func runScenario(t *testing.T, file string, a *txtar.Archive) {
	s := &script{sections: map[string]string{}, labels: map[string]int{}, traces: map[string]*trace{}}
	for _, f := range a.Files {
		s.sections[f.Name] = string(f.Data)
	}
	scene := &sim.Scene{Format: sim.SceneFormat, Seed: 1}
	if text, ok := s.sections["scene.toml"]; ok {
		text, err := offsets(text)
		if err == nil {
			scene, err = sim.ParseScene([]byte(text))
		}
		if err != nil {
			t.Fatalf("%s: scene.toml: %v", file, err)
		}
	}
	s.rig = newRig(t, scene)
	if text, ok := s.sections["policy.toml"]; ok {
		s.write("policy.toml", text)
	}
	for n, line := range strings.Split(s.sections["script"], "\n") {
		if err := s.line(line); err != nil {
			t.Errorf("%s: script line %d: %s\n\t%v", file, n+1, strings.TrimSpace(line), err)
			s.describe()
			break
		}
	}
	if err := s.judge(); err != nil {
		t.Errorf("%s: at the end: %v", file, err)
	}
	if err := s.stop(); err != nil {
		t.Errorf("%s: stop: %v", file, err)
	}
}

// line does one line.
func (s *script) line(text string) error {
	words, err := split(text)
	if err != nil || len(words) == 0 {
		return err
	}
	fails := words[0] == "!"
	if fails {
		words = words[1:]
	}
	if len(words) == 0 {
		return errors.New("no command")
	}
	c, ok := commands[words[0]]
	if !ok {
		return fmt.Errorf("there is no command %q", words[0])
	}
	err = c(s, words[1:])
	if !fails {
		return err
	}
	if s.failure = err; err == nil {
		return errors.New("it did not fail")
	}
	return nil
}

// split takes a line apart at blanks; '…' keeps blanks; # begins a comment.
func split(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	open, quoted := false, false
	for _, c := range line {
		switch {
		case c == '\'':
			quoted, open = !quoted, true
		case quoted:
			word.WriteRune(c)
		case c == '#' && !open:
			return words, nil
		case c == ' ' || c == '\t':
			if open {
				words = append(words, word.String())
				word.Reset()
				open = false
			}
		default:
			open = true
			word.WriteRune(c)
		}
	}
	if quoted {
		return nil, errors.New("a quote is not closed")
	}
	if open {
		words = append(words, word.String())
	}
	return words, nil
}

// options takes the KEY=VALUE words out of a command's words.
func options(words []string, known ...string) (rest []string, opts map[string]string, err error) {
	opts = map[string]string{}
	for _, w := range words {
		k, v, ok := strings.Cut(w, "=")
		switch {
		case !ok:
			rest = append(rest, w)
		case !slices.Contains(known, k):
			return nil, nil, fmt.Errorf("%q is none of %v", k, known)
		default:
			opts[k] = v
		}
	}
	return rest, opts, nil
}

// pid reads a process: its number, or the label of a fork.
func (s *script) pid(word string) (int, error) {
	if n, ok := s.labels[word]; ok {
		return n, nil
	}
	n, err := strconv.Atoi(word)
	if err != nil {
		return 0, fmt.Errorf("%q is neither a pid nor a label", word)
	}
	return n, nil
}

var offset = regexp.MustCompile(`\$\(([^!()]+)!([^+()]+)(?:\+(-?\d+))?\)`)

// offsets replaces $(mingw/app.dll!vuln+1) by app.dll!+0x….
func offsets(text string) (string, error) {
	var failed error
	out := offset.ReplaceAllStringFunc(text, func(m string) string {
		parts := offset.FindStringSubmatch(m)
		rva, err := rvaOf(parts[1], parts[2])
		if err != nil {
			failed = err
			return m
		}
		plus, _ := strconv.Atoi(parts[3])
		return fmt.Sprintf("%s!+%#x", filepath.Base(parts[1]), int(rva)+plus)
	})
	return out, failed
}

// rvaOf finds an export of a fixture.
func rvaOf(file, export string) (uint32, error) {
	f, err := os.Open(filepath.Join(fixtures, file))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	im, err := pe.Parse(f, info.Size())
	if err != nil {
		return 0, err
	}
	list, err := im.Exports()
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		if e.Name == export {
			return e.RVA, nil
		}
	}
	return 0, fmt.Errorf("%s has no export %q", file, export)
}
