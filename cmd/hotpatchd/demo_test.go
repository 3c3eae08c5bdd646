package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// labels are the words that begin the lines of the demonstration.
func labels(text string) []string {
	var out []string
	for line := range strings.Lines(text) {
		if line = strings.TrimRight(line, "\n"); len(line) > 16 && line[0] != ' ' {
			if l := strings.TrimSpace(line[:16]); l != "" && !strings.HasPrefix(line, "SIMULATED") {
				out = append(out, l)
			}
		}
	}
	return out
}

// full is where nothing can be printed.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left") }

func TestDemoSaysThatItCannotPrint(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for _, c := range commands() {
		if c.name != "demo" {
			continue
		}
		var errOut bytes.Buffer
		if code := c.run(&c, []string{"--backend", "sim"}, full{}, &errOut); code != exitFailed || errOut.String() != "hotpatchd: cannot print: no space left\n" {
			t.Errorf("exit %d, %q", code, errOut.String())
		}
	}
}

func TestDemoSimulated(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(readme), "<!-- demo -->\n")
	block, _, _ = strings.Cut(block, "<!-- /demo -->")
	var shown strings.Builder
	for line := range strings.Lines(block) {
		shown.WriteString(strings.TrimPrefix(line, "    "))
	}
	for _, direct := range []bool{false, true} {
		temp := t.TempDir()
		t.Setenv("TMPDIR", temp)
		s := newSimStage()
		s.direct = direct || s.direct
		var out bytes.Buffer
		if err := tell(context.Background(), s, &out); err != nil {
			t.Fatalf("direct %v: %v\n%s", direct, err, out.String())
		}
		if left, _ := filepath.Glob(filepath.Join(temp, "*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		// The README shows what the demonstration prints.
		if got, want := labels(out.String()), labels(shown.String()); !slices.Equal(got, want) {
			t.Errorf("the demonstration prints %q, the README shows %q", got, want)
		}
	}
}

// liar is a stage whose processes answer something else at the n-th question.
type liar struct {
	*simStage
	left int
}

func (l *liar) answers(pid int) (int, error) {
	l.left--
	if l.left < 0 {
		return 7, nil
	}
	return l.simStage.answers(pid)
}

// A claim that is not true must end the story.
func TestDemoAssertsItsClaims(t *testing.T) {
	if testing.Short() {
		t.Skip("needs half a minute a claim: not with -short")
	}
	for _, n := range []int{0, 2} {
		t.Setenv("TMPDIR", t.TempDir())
		var out bytes.Buffer
		if err := tell(context.Background(), &liar{newSimStage(), n}, &out); err == nil {
			t.Errorf("a lie after %d answers went unnoticed:\n%s", n, out.String())
		}
	}
}

func TestDemoSaysWhatItCannotUse(t *testing.T) {
	if code, out, errOut := call("demo", "extra"); code != exitUsage || out != "" || !strings.Contains(errOut, `demo takes no argument "extra"`) {
		t.Errorf("an argument: exit %d, %q, %q", code, out, errOut)
	}
	missing := filepath.Join(t.TempDir(), "missing")
	t.Setenv("TMPDIR", missing)
	t.Setenv("TMP", missing) // Windows
	code, out, _ := call("demo", "--backend", "sim")
	if code != exitFailed || !strings.Contains(out, "cannot make a folder for the demonstration") || !strings.Contains(out, "TMPDIR") {
		t.Errorf("no room: exit %d, %q", code, out)
	}
}
