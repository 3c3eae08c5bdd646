package baseline

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Phase is how far the work on one set has come.
type Phase string

// The phases. Those marked with * are passed through: Recover ends them, and Tidy
// where something could not be removed.
const (
	Staging    Phase = "staging"    // * new files are being written beside the old ones
	Scheduling Phase = "scheduling" // * the system is being asked to move them at the restart
	Staged     Phase = "staged"     // complete on the disk, takes effect at the next restart
	Activating Phase = "activating" // * some destinations may be new
	Active     Phase = "active"     // all destinations are new, the old files are kept
	Leaving    Phase = "leaving"    // active, and the old files take effect again at the next restart
	Reverting  Phase = "reverting"  // * some destinations may be old again
	Clearing   Phase = "clearing"   // * names of ours are being removed; the destinations stay as they are
)

// Record is one set of files, as its journal tells.
type Record struct {
	Product string          `json:"product"`
	Release string          `json:"release"`
	Phase   Phase           `json:"phase"`
	Boot    string          `json:"boot"`  // in which the last phase was reached
	Since   time.Time       `json:"since"` // of the last phase
	Note    string          `json:"note,omitempty"`
	Info    json.RawMessage `json:"info,omitempty"` // the caller's, kept as it is
	Files   []Entry         `json:"files"`
}

// Entry is one destination of a set. Its staged and kept files lie beside it.
type Entry struct {
	Destination string     `json:"destination"`
	New         string     `json:"new"` // SHA-256, lower-case hex
	Size        int64      `json:"size"`
	Old         string     `json:"old"`  // SHA-256 of what it replaces, "" if there is nothing
	Like        Attributes `json:"like"` // of what it replaces
	Stem        string     `json:"stem"` // path of our names without their suffix
}

// Attributes are what a new file takes over from the old one, as far as numbers
// tell; extended attributes or descriptors are copied when it is staged.
type Attributes struct {
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
	Mode uint32 `json:"mode"` // permission bits only
}

// Names of ours end so. None looks like a library to a program that lists a folder.
const (
	newSuffix  = ".hotpatch-new"
	oldSuffix  = ".hotpatch-old"
	backSuffix = ".hotpatch-back" // a second name of the old file, for the system to move
)

func (e Entry) staged() string { return e.Stem + newSuffix }
func (e Entry) kept() string   { return e.Stem + oldSuffix }
func (e Entry) back() string   { return e.Stem + backSuffix }

const (
	journalFormat = "hotpatch-baseline-journal/1"
	journalSuffix = ".json"
	damagedSuffix = ".damaged"
	maxJournal    = 4 << 20 // bytes: 256 files with the longest names are far below
)

type journal struct {
	Format string `json:"format"`
	Record
}

// journalName is no product's own name: names that differ in case only would be
// one file on many file systems, and some are those of devices of Windows.
func journalName(product string) string {
	sum := sha256.Sum256([]byte(product))
	return hex.EncodeToString(sum[:]) + journalSuffix
}

func (x *Area) journalFile(product string) string {
	return filepath.Join(x.dir, journalName(product))
}

// write makes a record durable: whole or not at all, then in the folder.
func (x *Area) write(r Record) error {
	body, err := json.Marshal(journal{journalFormat, r})
	if err != nil {
		return fmt.Errorf("cannot write the journal of %s: %w", r.Product, err)
	}
	sum := sha256.Sum256(body)
	body = append(append(body, '\n'), hex.EncodeToString(sum[:])+"\n"...)
	path := x.journalFile(r.Product)
	if err := x.step("journal " + string(r.Phase)); err != nil {
		return fmt.Errorf("cannot write the journal of %s: %w", r.Product, err)
	}
	temp := path + ".tmp"
	if err := writeSynced(temp, body); err != nil {
		return fmt.Errorf("cannot write the journal of %s: %w", r.Product, err)
	}
	if err := x.step("journal into place"); err != nil {
		return fmt.Errorf("cannot write the journal of %s: %w", r.Product, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("cannot write the journal of %s: %w", r.Product, err)
	}
	if err := syncFolder(x.dir); err != nil {
		return fmt.Errorf("cannot write the journal of %s: %w", r.Product, err)
	}
	x.records[r.Product] = r
	return nil
}

// drop ends the story of a product's set.
func (x *Area) drop(product string) error {
	if err := x.step("journal removed"); err != nil {
		return err
	}
	if err := os.Remove(x.journalFile(product)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the journal of %s: %w", product, err)
	}
	delete(x.records, product)
	return syncFolder(x.dir)
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// readJournals reads what is under way. A journal that cannot be read is set
// aside: what it told of is left as it is.
func readJournals(dir string) (map[string]Record, []string, error) {
	list, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the journals: %w", err)
	}
	records := map[string]Record{}
	var damaged []string
	for _, e := range list {
		name := e.Name()
		if !strings.HasSuffix(name, journalSuffix) {
			continue
		}
		r, err := readJournal(filepath.Join(dir, name))
		if err == nil && journalName(r.Product) != name {
			err = fmt.Errorf("it is of the product %q", r.Product)
		}
		if err != nil {
			damaged = append(damaged, fmt.Sprintf("%s: %v", name, err))
			if err := os.Rename(filepath.Join(dir, name), filepath.Join(dir, name+damagedSuffix)); err != nil {
				return nil, nil, fmt.Errorf("cannot set a damaged journal aside: %w", err)
			}
			continue
		}
		records[r.Product] = r
	}
	return records, damaged, nil
}

func readJournal(path string) (Record, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Record{}, err
	}
	if info.Size() > maxJournal {
		return Record{}, fmt.Errorf("%d bytes, more than %d", info.Size(), maxJournal)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return Record{}, err
	}
	body, rest, ok := bytes.Cut(b, []byte("\n"))
	sum := sha256.Sum256(body)
	if !ok || strings.TrimSpace(string(rest)) != hex.EncodeToString(sum[:]) {
		return Record{}, errors.New("its sum is wrong")
	}
	var j journal
	if err := json.Unmarshal(body, &j); err != nil {
		return Record{}, err
	}
	if j.Format != journalFormat {
		return Record{}, fmt.Errorf("its format is %.64q, not %q", j.Format, journalFormat)
	}
	return j.Record, nil
}
