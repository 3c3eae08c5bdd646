package repository

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
	"github.com/theupdateframework/go-tuf/v2/metadata/config"
	"github.com/theupdateframework/go-tuf/v2/metadata/updater"
)

// Caps on metadata, in bytes and steps. Lengths of snapshot and targets are
// signed as well; these hold for what is not.
const (
	maxRootLength      = 512 << 10
	maxTimestampLength = 16 << 10
	maxSnapshotLength  = 2 << 20
	maxTargetsLength   = 16 << 20
	maxRootRotations   = 256
)

// noFolder is a path that no system can open. go-tuf reads its own cache even
// when told to keep none; there must not be one.
const noFolder = "\x00"

// metadataURL is what go-tuf prepends to file names; session cuts it off.
const metadataURL = "metadata:/"

// source gives one metadata file by name, at most limit bytes. A file that is
// not there is an Error with CodeNotFound.
type source func(name string, limit int64) ([]byte, error)

// session is one verification: a source of bytes, a time, and what was read.
// It is the fetcher of one go-tuf updater.
type session struct {
	from source
	at   time.Time
	last string            // name of the file asked for last
	got  map[string][]byte // every file that came, by name
}

// trustedSet is what one session verified. Members are nil as far as it did not get.
type trustedSet struct {
	root      *metadata.Metadata[metadata.RootType]
	timestamp *metadata.Metadata[metadata.TimestampType]
	snapshot  *metadata.Metadata[metadata.SnapshotType]
	targets   *metadata.Metadata[metadata.TargetsType]
	rootBytes []byte
}

// DownloadFile implements fetcher.Fetcher.
func (s *session) DownloadFile(url string, limit int64, _ time.Duration) ([]byte, error) {
	name := strings.TrimPrefix(url, metadataURL)
	b, err := s.from(name, limit)
	if CodeOf(err) == CodeNotFound && strings.HasSuffix(name, ".root.json") {
		// The next root is missing: that is how the newest one is known.
		return nil, &metadata.ErrDownloadHTTP{StatusCode: http.StatusNotFound, URL: name}
	}
	s.last = name
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fail(CodeTooLarge, &metadata.ErrDownloadLengthMismatch{Msg: name}, "%s is longer than %d bytes", name, limit)
	}
	s.got[name] = b
	return b, nil
}

// verify runs the client workflow of the TUF specification (5.3 to 5.6) from
// root over what from gives, judged at the time at. The set holds what was
// verified also when the error is not nil.
func verify(root []byte, from source, at time.Time) (set *trustedSet, s *session, err error) {
	s = &session{from: from, at: at, last: "root.json", got: map[string][]byte{}}
	set = &trustedSet{rootBytes: root}
	defer func() {
		if p := recover(); p != nil {
			err = fail(CodeDamaged, fmt.Errorf("panic: %v", p), "%s made the verifier fail", s.last).hint(hintStays)
		}
	}()
	cfg, err := config.New(metadataURL, root)
	if err != nil {
		return set, s, fail(CodeConfig, err, "cannot set up verification")
	}
	cfg.Fetcher = s
	cfg.DisableLocalCache = true
	cfg.LocalMetadataDir = noFolder
	cfg.MaxRootRotations = maxRootRotations
	cfg.RootMaxLength, cfg.TimestampMaxLength = maxRootLength, maxTimestampLength
	cfg.SnapshotMaxLength, cfg.TargetsMaxLength = maxSnapshotLength, maxTargetsLength
	u, err := updater.New(cfg)
	if err != nil {
		return set, s, fail(CodeConfig, err, "root.json is not a root of trust: damaged, or not signed by its own keys")
	}
	u.UnsafeSetRefTime(at)
	err = u.Refresh()
	trusted := u.GetTrustedMetadataSet()
	set.root, set.timestamp, set.snapshot = trusted.Root, trusted.Timestamp, trusted.Snapshot
	set.targets = trusted.Targets[metadata.TARGETS]
	if b, ok := s.got[versioned(set.root.Signed.Version, metadata.ROOT)]; ok {
		set.rootBytes = b
	}
	if err != nil {
		return set, s, s.explain(err, set)
	}
	return set, s, nil
}

// Floors are the highest versions ever trusted, and the keys they were trusted
// by. The caller keeps them, apart from the cache, and gives them back; they
// are never lowered. One exception, signed by the root keys: where a newer root
// names other keys for a role, the count of that role begins anew
// (specification 5.3.11: recovery from a stolen key that counted up).
type Floors struct {
	Root      int64  `json:"root"`
	Timestamp int64  `json:"timestamp"`
	Snapshot  int64  `json:"snapshot"`
	Targets   int64  `json:"targets"`
	Keys      string `json:"keys,omitempty"` // of timestamp and snapshot, when the versions were trusted
}

// raise returns floors that cover set too. Only what verified counts.
func (f Floors) raise(set *trustedSet) Floors {
	if set.root == nil || set.root.Signed.Version < f.Root {
		return f
	}
	if keys := roleKeys(set.root); keys != f.Keys {
		if f.Keys != "" && set.root.Signed.Version > f.Root {
			f.Timestamp, f.Snapshot = 0, 0
		}
		f.Keys = keys
	}
	f.Root = set.root.Signed.Version
	if set.timestamp != nil {
		f.Timestamp = max(f.Timestamp, set.timestamp.Signed.Version)
	}
	if set.snapshot != nil {
		f.Snapshot = max(f.Snapshot, set.snapshot.Signed.Version)
	}
	if set.targets != nil {
		f.Targets = max(f.Targets, set.targets.Signed.Version)
	}
	return f
}

// check refuses a set with any version below its floor.
func (f Floors) check(set *trustedSet) error {
	f = f.raise(&trustedSet{root: set.root})
	type pair struct {
		name       string
		got, floor int64
	}
	pairs := []pair{{"root.json", set.root.Signed.Version, f.Root}}
	if set.timestamp != nil {
		pairs = append(pairs, pair{"timestamp.json", set.timestamp.Signed.Version, f.Timestamp},
			pair{"snapshot.json", metaVersion(set.timestamp.Signed.Meta, "snapshot.json"), f.Snapshot})
	}
	if set.snapshot != nil {
		pairs = append(pairs, pair{"targets.json", metaVersion(set.snapshot.Signed.Meta, "targets.json"), f.Targets})
	}
	for _, p := range pairs {
		if p.got < p.floor {
			return fail(CodeRollback, &metadata.ErrBadVersionNumber{Msg: p.name},
				"%s has version %d, but this device has trusted version %d: an old mirror, or an attack that brings back old releases",
				p.name, p.got, p.floor).hint(hintStays)
		}
	}
	return nil
}

// roleKeys names the keys whose loss lets an attacker count versions up.
func roleKeys(root *metadata.Metadata[metadata.RootType]) string {
	var all []string
	for _, role := range []string{metadata.TIMESTAMP, metadata.SNAPSHOT} {
		if r := root.Signed.Roles[role]; r != nil {
			ids := slices.Clone(r.KeyIDs)
			slices.Sort(ids)
			all = append(all, strings.Join(ids, ","))
		}
	}
	return strings.Join(all, ";")
}

// ends is the earliest end of the four roles and the file it belongs to.
func (t *trustedSet) ends() (time.Time, string) {
	end, name := t.root.Signed.Expires, "root.json"
	for _, r := range []struct {
		at   time.Time
		name string
	}{{t.timestamp.Signed.Expires, "timestamp.json"}, {t.snapshot.Signed.Expires, "snapshot.json"}, {t.targets.Signed.Expires, "targets.json"}} {
		if r.at.Before(end) {
			end, name = r.at, r.name
		}
	}
	return end, name
}

// versioned is a metadata file's name under consistent snapshots.
func versioned(version int64, role string) string {
	return strconv.FormatInt(version, 10) + "." + role + ".json"
}

func metaVersion(meta map[string]*metadata.MetaFiles, name string) int64 {
	if m := meta[name]; m != nil {
		return m.Version
	}
	return 0
}

// head is the part of any metadata that an error sentence may quote before
// its signature is known to be good.
type head struct {
	Type    string    `json:"_type"`
	Version int64     `json:"version"`
	Expires time.Time `json:"expires"`
}

func headOf(b []byte) head {
	var doc struct {
		Signed head `json:"signed"`
	}
	_ = json.Unmarshal(b, &doc) // nothing to quote then
	return doc.Signed
}

// readRoot parses a root and verifies it by its own keys.
func readRoot(b []byte) (*metadata.Metadata[metadata.RootType], error) {
	if len(b) > maxRootLength {
		return nil, fmt.Errorf("%d bytes, more than %d", len(b), maxRootLength)
	}
	set, _, err := verify(b, func(string, int64) ([]byte, error) { return nil, errOffline }, time.Time{})
	if !errors.Is(err, errOffline) {
		return nil, err
	}
	return set.root, nil
}

// errOffline ends a session that only looks at its root.
var errOffline = errors.New("nothing else to read")
