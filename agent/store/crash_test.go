package store

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The test binary plays the daemon when this is set: to the state file to write
// to without end, a line per commit.
const envWriter = "STORE_TEST_WRITER"

func TestMain(m *testing.M) {
	if path := os.Getenv(envWriter); path != "" {
		writer(path)
	}
	os.Exit(m.Run())
}

// writer commits record n together with history entry n and says "n" when it is
// on disk; an error ends it with "error TEXT" after it has read everything once more.
func writer(path string) {
	s, damage, err := Open(path)
	if err != nil || damage != nil {
		fmt.Println("error", err, damage)
		os.Exit(1)
	}
	var n int
	s.View(func(tx *Tx) error { r, _ := tx.Records(); n = len(r); return nil })
	for {
		err := s.Update(func(tx *Tx) error {
			e, err := tx.Append(entry(n))
			if err != nil {
				return err
			}
			return tx.PutRecord(fmt.Sprintf("rec-%08d", n), fmt.Append(nil, e.Seq, " ", strings.Repeat("x", n%3000)))
		})
		if err != nil {
			if bad := whole(s, n); bad != nil {
				fmt.Println("error lost:", bad)
				os.Exit(1)
			}
			fmt.Println("error", err)
			os.Exit(0)
		}
		n++
		fmt.Println(n)
	}
}

// whole checks that records and history agree and are at least min long.
func whole(s *Store, min int) error {
	return s.View(func(tx *Tx) error {
		records, err := tx.Records()
		if err != nil {
			return err
		}
		seq, _, err := tx.Head()
		if err != nil {
			return err
		}
		if len(records) < min || int(seq) != len(records) {
			return fmt.Errorf("%d records, %d history entries, %d were acknowledged", len(records), seq, min)
		}
		for n := range len(records) {
			want := fmt.Sprint(n+1, " ", strings.Repeat("x", n%3000))
			if got := string(records[fmt.Sprintf("rec-%08d", n)]); got != want {
				return fmt.Errorf("record %d has %d bytes, want %d", n, len(got), len(want))
			}
		}
		return tx.VerifyHistory()
	})
}

// TestKilledWriter kills a daemon at random moments: nothing that it
// acknowledged is lost, nothing is torn, and the file opens again every time.
func TestKilledWriter(t *testing.T) {
	const kills = 45
	path := filepath.Join(t.TempDir(), "state.db")
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 0))
	for i := range kills {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envWriter+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		if _, err := lines.ReadString('\n'); err != nil { // it writes
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rng.IntN(15000)) * time.Microsecond)
		cmd.Process.Kill()
		rest, _ := io.ReadAll(lines)
		cmd.Wait()
		acked := 0
		for _, line := range strings.Split(string(rest), "\n") {
			if n, err := strconv.Atoi(line); err == nil {
				acked = max(acked, n)
			} else if strings.HasPrefix(line, "error") {
				t.Fatalf("kill %d: %s", i, line)
			}
		}
		s, damage, err := Open(path)
		if err != nil || damage != nil {
			t.Fatalf("kill %d: %v, damage %v", i, err, damage)
		}
		if err := whole(s, acked); err != nil {
			t.Fatalf("kill %d: %v", i, err)
		}
		s.Close()
	}
}
