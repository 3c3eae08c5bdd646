package repository

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
)

// Report is what a client would find in a repository.
type Report struct {
	Root      int64             `json:"root"` // versions
	Timestamp int64             `json:"timestamp"`
	Snapshot  int64             `json:"snapshot"`
	Targets   int64             `json:"targets"`
	Expires   map[string]string `json:"expires"` // RFC 3339, by role
	Releases  []TargetReport    `json:"releases"`
	Warnings  []string          `json:"warnings"`
}

// TargetReport is one release in a Report. Problem is "" if it is sound.
type TargetReport struct {
	Target  string `json:"target"`
	ID      string `json:"id"`
	Length  int64  `json:"length"` // bytes
	SHA256  string `json:"sha256"`
	Problem string `json:"problem"`
	// Published and Rollout are null where the target is no offer to this version.
	Published *time.Time `json:"published"`
	Rollout   *Rollout   `json:"rollout"`
}

// Problems counts the releases that are not sound.
func (r Report) Problems() int {
	n := 0
	for _, t := range r.Releases {
		if t.Problem != "" {
			n++
		}
	}
	return n
}

// Verify reads the repository in dir as a client would that trusts its
// root.json, at the time now: all metadata, and every release's bytes and
// manifest. Metadata that a client would refuse is an error, a release it
// would refuse a Problem.
func Verify(dir string, now time.Time) (Report, error) {
	root, err := os.ReadFile(filepath.Join(dir, "root.json"))
	if err != nil {
		return Report{}, fmt.Errorf("%s is not a repository: %w", dir, err)
	}
	set, _, err := verify(root, folderSource(os.DirFS(filepath.Join(dir, "metadata"))), now)
	if err != nil {
		return Report{}, err
	}
	r := Report{Root: set.root.Signed.Version, Timestamp: set.timestamp.Signed.Version,
		Snapshot: set.snapshot.Signed.Version, Targets: set.targets.Signed.Version,
		Expires: map[string]string{}, Releases: []TargetReport{}, Warnings: set.warnings(now, soonBefore)}
	for role, at := range map[string]time.Time{metadata.ROOT: set.root.Signed.Expires, metadata.TARGETS: set.targets.Signed.Expires,
		metadata.SNAPSHOT: set.snapshot.Signed.Expires, metadata.TIMESTAMP: set.timestamp.Signed.Expires} {
		r.Expires[role] = at.UTC().Format(time.RFC3339)
	}
	offers, skipped, err := readOffers(set.targets.Signed.Targets)
	if err != nil {
		return r, err
	}
	for _, o := range offers {
		t := TargetReport{Target: o.Target, ID: o.ID, Length: o.Length, SHA256: o.SHA256, Published: &o.Published, Rollout: &o.Rollout}
		if err := verifyRelease(dir, o); err != nil {
			t.Problem = err.Error()
		}
		r.Releases = append(r.Releases, t)
	}
	for _, s := range skipped {
		r.Releases = append(r.Releases, TargetReport{Target: s.Target, Problem: s.Reason})
	}
	return r, nil
}

func verifyRelease(dir string, o Offer) error {
	b, err := folderSource(os.DirFS(filepath.Join(dir, "targets")))(targetFile(o.Target, o.SHA256), o.Length)
	if err != nil {
		return err
	}
	if !matches(o, b) {
		return fail(CodeSignature, nil, "%s is not the file that was signed", targetFile(o.Target, o.SHA256))
	}
	r, err := release.Open(b)
	if err != nil {
		return err
	}
	if err := o.Agrees(&r.Manifest); err != nil {
		return err
	}
	return r.CheckTables()
}
