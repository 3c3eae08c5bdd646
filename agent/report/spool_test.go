package report

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func open(t *testing.T, dir string, count int, bytes int64) *Spool {
	t.Helper()
	s, err := OpenSpool(dir, count, bytes)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Spool, doc string) {
	t.Helper()
	id, err := s.Put([]byte(doc))
	if err != nil || id != IDOf([]byte(doc)) {
		t.Fatalf("%s, %v", id, err)
	}
}

// drain takes everything out and returns it in order.
func drain(t *testing.T, s *Spool) (docs []string) {
	t.Helper()
	for {
		e, ok, err := s.Oldest()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return docs
		}
		docs = append(docs, string(e.Document))
		if err := s.Done(e); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSpoolKeepsOrderOverLives(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, 0, 0)
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprintf("doc %d", i))
		put(t, s, want[i])
		put(t, s, want[i]) // twice is once
		if i%7 == 0 {
			s = open(t, dir, 0, 0)
		}
	}
	got := drain(t, open(t, dir, 0, 0))
	if strings.Join(got, ",") != strings.Join(want, ",") {
		t.Errorf("%v", got)
	}
	if s := open(t, dir, 0, 0).Standing(); s.Waiting != 0 || s.Dropped != 0 {
		t.Errorf("%+v", s)
	}
}

// The oldest make room, and are counted, in this life and the next.
func TestSpoolIsBounded(t *testing.T) {
	for name, bound := range map[string][2]int{"count": {5, 1 << 20}, "bytes": {1000, 5 * len("doc 00")}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, bound[0], int64(bound[1]))
			for i := range 12 {
				put(t, s, fmt.Sprintf("doc %02d", i))
				if st := s.Standing(); st.Waiting > 5 || st.Bytes > int64(5*len("doc 00")) {
					t.Fatalf("%+v", st)
				}
			}
			s = open(t, dir, bound[0], int64(bound[1]))
			if st := s.Standing(); st.Dropped != 7 || st.Waiting != 5 {
				t.Errorf("%+v", st)
			}
			if got := strings.Join(drain(t, s), ","); got != "doc 07,doc 08,doc 09,doc 10,doc 11" {
				t.Errorf("%s", got)
			}
		})
	}
	s := open(t, t.TempDir(), 0, 0)
	for _, n := range []int{0, MaxReport + 1} {
		if _, err := s.Put(make([]byte, n)); err == nil {
			t.Errorf("%d bytes taken", n)
		}
	}
}

// What a crash, a disk or a person did to the folder costs the document it hit.
func TestSpoolDamage(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, 0, 0)
	for i := range 3 {
		put(t, s, fmt.Sprintf("doc %d", i))
	}
	files, _ := filepath.Glob(filepath.Join(dir, "*"+suffix))
	if len(files) != 3 {
		t.Fatalf("%v", files)
	}
	if err := os.WriteFile(files[0], []byte("doc"), 0o600); err != nil { // torn
		t.Fatal(err)
	}
	if err := os.Remove(files[1]); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{temporary + "123", "note.txt", "zz" + suffix, strings.Repeat("0", 16) + "-zz" + suffix} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, waiting{number: 9, id: IDOf(nil)}.name()), 0o700); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, 0, 0)
	if got := strings.Join(drain(t, s), ","); got != "doc 2" || s.Standing().Dropped != 1 {
		t.Errorf("%s, %+v", got, s.Standing())
	}
	if _, err := os.Stat(filepath.Join(dir, temporary+"123")); err == nil {
		t.Error("a half written file is left")
	}
	if err := os.WriteFile(filepath.Join(dir, spoolState), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if st := open(t, dir, 0, 0).Standing(); st.Dropped != 0 {
		t.Errorf("%+v", st)
	}
	if err := os.WriteFile(filepath.Join(dir, spoolState), []byte(`{"format":"hotpatch-spool/2"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSpool(dir, 0, 0); err == nil || !strings.Contains(err.Error(), "hotpatch-spool/2") {
		t.Errorf("%v", err)
	}
}

// Since when nothing is delivered is known over lives, and counts from the first failure.
func TestSpoolRemembersFailing(t *testing.T) {
	dir := t.TempDir()
	first := time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC)
	for _, since := range []time.Time{first, first.Add(time.Hour)} {
		if err := open(t, dir, 0, 0).failing(since); err != nil {
			t.Fatal(err)
		}
	}
	s := open(t, dir, 0, 0)
	if got := s.Standing().FailingSince; !got.Equal(first) {
		t.Errorf("%s", got)
	}
	if err := s.failing(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if got := open(t, dir, 0, 0).Standing().FailingSince; !got.IsZero() {
		t.Errorf("%s", got)
	}
}

// A process that puts documents is killed at any moment: every document it has
// said to be kept is there, whole, and nothing half.
func TestSpoolSurvivesKill(t *testing.T) {
	if dir := os.Getenv("REPORT_TEST_SPOOL"); dir != "" {
		s := open(t, dir, 0, 0)
		for i := 0; ; i++ {
			doc := fmt.Sprintf("doc %d of %d %s", i, os.Getpid(), strings.Repeat("x", 5000))
			put(t, s, doc)
			fmt.Printf("kept %s\n", IDOf([]byte(doc)))
		}
	}
	dir := t.TempDir()
	kept := map[string]bool{}
	for round := range 12 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestSpoolSurvivesKill$")
		cmd.Env = append(os.Environ(), "REPORT_TEST_SPOOL="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for n := 0; lines.Scan(); n++ {
			if id, ok := strings.CutPrefix(lines.Text(), "kept "); ok {
				kept[id] = true
			}
			if n == 3+round {
				cmd.Process.Kill()
			}
		}
		cmd.Wait()
	}
	s := open(t, dir, 0, 0)
	if left, _ := filepath.Glob(filepath.Join(dir, temporary+"*")); len(left) != 0 {
		t.Errorf("%v", left)
	}
	if len(kept) < 12*3 {
		t.Fatalf("%d kept", len(kept))
	}
	for _, doc := range drain(t, s) {
		if !bytes.HasSuffix([]byte(doc), []byte("xxxx")) {
			t.Errorf("half a document: %.40s", doc)
		}
		delete(kept, IDOf([]byte(doc)))
	}
	if len(kept) != 0 || s.Standing().Dropped != 0 {
		t.Errorf("%d were kept and are gone, %+v", len(kept), s.Standing())
	}
}
