package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/release"
)

type rawJSON = json.RawMessage

func compact(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	if err := json.Compact(&buf, b); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestPublishAgain(t *testing.T) {
	f := newFixture(t)
	before := f.save()
	f.now = start.Add(time.Hour)
	res := f.publish("ACME-1", 1)
	if res.Changed || len(res.Unchanged) != 1 || len(res.Published) != 0 {
		t.Errorf("%+v", res)
	}
	if after := f.save(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Error("publishing the same again changed the repository")
	}
	// Other bytes under a known id: nothing of the call is published.
	_, err := Publish(f.dir, f.keys, [][]byte{container(t, "ACME-2", 2, 100), container(t, "ACME-1", 1, 4999)}, f.options())
	if err == nil || err.Error() != "ACME-1 was published before with other content; raise the sequence and take a new id" {
		t.Errorf("%v", err)
	}
	if after := f.save(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Error("a refused publish changed the repository")
	}
	// A release whose file got lost comes back.
	for name := range before {
		if strings.HasPrefix(name, "targets/") {
			if err := os.Remove(f.file(name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if report, err := Verify(f.dir, f.now); err != nil || report.Problems() != 1 {
		t.Errorf("%+v %v", report, err)
	}
	f.publish("ACME-1", 1)
	if report, err := Verify(f.dir, f.now); err != nil || report.Problems() != 0 {
		t.Errorf("%+v %v", report, err)
	}
}

func TestPublishRefusesBadReleases(t *testing.T) {
	f := newFixture(t)
	before := f.save()
	if _, err := Publish(f.dir, f.keys, [][]byte{[]byte("PK")}, f.options()); err == nil {
		t.Error("published")
	}
	if _, err := Publish(f.dir, f.keys, nil, f.options()); err == nil {
		t.Error("published nothing")
	}
	if fmt.Sprint(f.save()) != fmt.Sprint(before) {
		t.Error("the repository changed")
	}
}

func TestPublishWarnsOfBaseline(t *testing.T) {
	f := newFixture(t)
	image, stamp := hotpatchImage(t, 1, 5000, 3)
	res, err := Publish(f.dir, f.keys, [][]byte{containerFor(t, "ACME-B7", "ACME-7", 1, image, stamp)}, f.options())
	if err != nil || len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "ACME-7 needs the baseline ACME-B7 of product acme") {
		t.Errorf("%q, %v", res.Warnings, err)
	}
	if res := f.publish("ACME-8", 8); len(res.Warnings) != 0 {
		t.Errorf("of a release that needs none, beside one that was told of: %q", res.Warnings)
	}
}

func TestPublishWarnsOfSequence(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-5", 5)
	if res := f.publish("ACME-4", 4); len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "ACME-5 with sequence 5 is there already") {
		t.Errorf("%q", res.Warnings)
	}
	if res := f.publish("ACME-6", 6); len(res.Warnings) != 0 {
		t.Errorf("%q", res.Warnings)
	}
}

// A new repository needs all four keys, and a stranger's keys sign nothing.
func TestPublishKeys(t *testing.T) {
	f := newFixture(t)
	for _, role := range Roles {
		keys := Keys{}
		for r, k := range f.keys {
			if r != role {
				keys[r] = k
			}
		}
		dir := filepath.Join(t.TempDir(), "new")
		if _, err := Publish(dir, keys, [][]byte{container(t, "A", 1, 9)}, f.options()); err == nil || !strings.Contains(err.Error(), "key for "+role) {
			t.Errorf("%s: %v", role, err)
		}
	}
	stranger := newFixture(t)
	before := f.save()
	if _, err := Publish(f.dir, stranger.keys, [][]byte{container(t, "A", 1, 9)}, f.options()); err == nil || !strings.Contains(err.Error(), "targets.json needs 1 signatures") {
		t.Errorf("%v", err)
	}
	after := f.save()
	delete(after, "targets/"+targetFile(targetName("A"), "")) // an unnamed release file is harmless
	for name, b := range before {
		if !bytes.Equal(after[name], b) {
			t.Errorf("%s changed", name)
		}
	}
}

// A publisher that died after any of its writes: clients see the old state or
// the new one, and the next publish goes through.
func TestPublisherDies(t *testing.T) {
	f := newFixture(t)
	before := f.save()
	f.publish("ACME-2", 2)
	after := f.save()
	var names []string
	for _, name := range []string{"targets/releases/", "metadata/2.targets.json", "metadata/2.snapshot.json", "metadata/timestamp.json"} {
		for n := range after {
			if strings.HasPrefix(n, name) && !bytes.Equal(before[n], after[n]) {
				names = append(names, n)
			}
		}
	}
	if len(names) != 4 {
		t.Fatalf("publish wrote %v", names)
	}
	for alive := range len(names) + 1 {
		g := &fixture{t: t, dir: filepath.Join(t.TempDir(), "repo"), keys: f.keys, now: f.now}
		put := func(name string, b []byte) {
			if err := os.MkdirAll(filepath.Dir(g.file(name)), 0o755); err != nil {
				t.Fatal(err)
			}
			g.write(name, b)
		}
		for name, b := range before {
			put(name, b)
		}
		for _, name := range names[:alive] {
			put(name, after[name])
		}
		put("metadata/"+tempPrefix+"9", []byte("{"))
		want := 1
		if alive == len(names) {
			want = 2
		}
		c := g.client("")
		if n := len(mustRefresh(t, c).Offers); n != want {
			t.Errorf("died after %d writes: %d offers", alive, n)
		}
		g.publish("ACME-3", 3)
		if n := len(mustRefresh(t, c).Offers); n != want+1 {
			t.Errorf("died after %d writes, published again: %d offers", alive, n)
		}
		if report, err := Verify(g.dir, g.now); err != nil || report.Problems() != 0 {
			t.Errorf("died after %d writes: %+v %v", alive, report, err)
		}
		// Mirrors may hold what was written: a name never gets other bytes.
		for _, name := range names[:min(alive, 3)] {
			if !bytes.Equal(g.read(name), after[name]) {
				t.Errorf("died after %d writes: %s was written over", alive, name)
			}
		}
	}
}

// A publisher that died while it made the repository: the next one makes it.
func TestCreatorDies(t *testing.T) {
	f := newFixture(t)
	if err := os.Remove(f.file("root.json")); err != nil {
		t.Fatal(err)
	}
	if res := f.publish("ACME-1", 1); !res.Created {
		t.Errorf("%+v", res)
	}
	if len(mustRefresh(t, f.client("")).Offers) != 1 {
		t.Error("no offers")
	}
}

func TestTwoPublishers(t *testing.T) {
	f := newFixture(t)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		b := container(t, fmt.Sprintf("ACME-1%d", i), uint32(10+i), 100)
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, errs[i] = Publish(f.dir, f.keys, [][]byte{b}, f.options())
		}()
	}
	wg.Wait()
	published := 1
	for _, err := range errs {
		switch {
		case err == nil:
			published++
		case !strings.Contains(err.Error(), "another publisher is at work"):
			t.Error(err)
		}
	}
	if n := len(mustRefresh(t, f.client("")).Offers); n != published {
		t.Errorf("%d offers of %d published", n, published)
	}
	// What a dead publisher locked is free again after a while.
	f.write(".publishing", nil)
	if _, err := Refresh(f.dir, f.keys, f.options()); err == nil {
		t.Error("a fresh lock was passed over")
	}
	old := time.Now().Add(-2 * lockStale)
	if err := os.Chtimes(f.file(".publishing"), old, old); err != nil {
		t.Fatal(err)
	}
	if _, err := Refresh(f.dir, f.keys, f.options()); err != nil {
		t.Error(err)
	}
}

// Devices that read the folder just then neither keep the publisher from its
// work nor see anything but one of the two states.
func TestPublishWhileDevicesRead(t *testing.T) {
	f := newFixture(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	reads := make([]int, 4)
	for i := range reads {
		c := f.client("")
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := c.Refresh(context.Background()); err != nil {
					t.Errorf("a device: %v (%v)", err, errors.Unwrap(err))
				}
				reads[i]++
			}
		})
	}
	for range 25 {
		if _, err := Refresh(f.dir, f.keys, f.options()); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	wg.Wait()
	t.Log(reads)
}

func TestRefreshSigns(t *testing.T) {
	f := newFixture(t)
	c := f.client("")
	mustRefresh(t, c)
	f.now = start.Add(20 * 24 * time.Hour)
	online := Keys{metadata.SNAPSHOT: f.keys[metadata.SNAPSHOT], metadata.TIMESTAMP: f.keys[metadata.TIMESTAMP]}
	if _, err := Refresh(f.dir, online, f.options()); err != nil {
		t.Fatal(err)
	}
	f.now = start.Add(45 * 24 * time.Hour) // past the first timestamp
	catalog := mustRefresh(t, c)
	if catalog.Floors.Timestamp != 2 || catalog.Floors.Targets != 1 || catalog.Floors.Root != 1 {
		t.Errorf("%+v", catalog.Floors)
	}
	// Close to the end of root and targets: renewed with the keys, told without.
	f.now = start.Add(longExpires - 10*24*time.Hour)
	res, err := Refresh(f.dir, online, f.options())
	if err != nil || len(res.Warnings) != 2 || !strings.Contains(res.Warnings[0], "targets.json ends 10 Nov 2027 12:00 UTC, in 10 days: run hotpatch-build refresh with snapshot.pem, timestamp.pem and targets.pem") ||
		!strings.Contains(res.Warnings[1], "root.json ends") {
		t.Fatalf("%+v %v", res, err)
	}
	if res, err = Refresh(f.dir, f.keys, f.options()); err != nil || len(res.Warnings) != 0 {
		t.Fatalf("%+v %v", res, err)
	}
	f.now = start.Add(longExpires + 10*24*time.Hour)
	catalog = mustRefresh(t, c)
	if catalog.Floors.Root != 2 || catalog.Floors.Targets != 2 {
		t.Errorf("%+v", catalog.Floors)
	}
	if !bytes.Equal(catalog.NewestRoot, f.root()) || !bytes.Equal(c.Root(), f.root()) {
		t.Error("the newest root is not the repository's")
	}
	if _, err := Refresh(filepath.Join(t.TempDir(), "none"), f.keys, f.options()); err == nil {
		t.Error("refreshed nothing")
	}
}

// A publisher does not sign what others put into its folder.
func TestPublisherSignsNothingForeign(t *testing.T) {
	f, thief := newFixture(t), newFixture(t)
	targets := parse(f, metadata.Targets(), "1.targets.json")
	b := resign(f, targets, metadata.TARGETS, "1.targets.json", thief.keys)
	snap := parse(f, metadata.Snapshot(), "1.snapshot.json")
	meta, err := metaFile(1, b)
	if err != nil {
		t.Fatal(err)
	}
	snap.Signed.Meta["targets.json"] = meta
	signSnapshot(f, snap)
	if _, err := Publish(f.dir, f.keys, [][]byte{container(t, "ACME-2", 2, 10)}, f.options()); CodeOf(err) != CodeSignature {
		t.Errorf("%v", err)
	}
}

func TestVerifyReportsDamage(t *testing.T) {
	f := newFixture(t)
	f.publish("ACME-2", 2)
	for name, b := range f.save() {
		if strings.HasSuffix(name, "ACME-2.hotpatch") {
			b[99] ^= 1
			f.write(name, b)
		}
	}
	report, err := Verify(f.dir, f.now)
	if err != nil || report.Problems() != 1 || report.Releases[0].Problem != "" || !strings.Contains(report.Releases[1].Problem, "not the file that was signed") {
		t.Errorf("%+v %v", report, err)
	}
	if _, err := Verify(f.dir, start.Add(31*24*time.Hour)); CodeOf(err) != CodeExpired {
		t.Errorf("%v", err)
	}
	report, err = Verify(f.dir, start.Add(20*24*time.Hour))
	if err != nil || report.Expires["timestamp"] != "2026-12-10T12:00:00Z" || len(report.Warnings) != 0 {
		t.Errorf("%+v %v", report, err)
	}
}

// Metadata decided that a release fits: its manifest must say the same.
func TestAgrees(t *testing.T) {
	f := newFixture(t)
	o := mustRefresh(t, f.client("")).Offers[0]
	r, err := release.Open(container(t, "ACME-1", 1, 5000))
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Agrees(&r.Manifest); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(m *release.Manifest){
		"id": func(m *release.Manifest) { m.ID = "X" }, "product": func(m *release.Manifest) { m.Product = "x" },
		"sequence": func(m *release.Manifest) { m.Sequence++ }, "baseline": func(m *release.Manifest) { m.Baseline = "b" },
		"month": func(m *release.Manifest) { m.Month = "2026-12" }, "kind": func(m *release.Manifest) { m.Kind = release.KindBaseline },
		"os":   func(m *release.Manifest) { m.Requires.OS = []string{"windows"} },
		"base": func(m *release.Manifest) { m.Images[0].Base.TimeDateStamp++ },
	} {
		m := r.Manifest
		m.Images = append([]release.Image{}, m.Images...)
		spoil(&m)
		if o.Agrees(&m) == nil {
			t.Errorf("%s may differ", name)
		}
	}
}

func TestKeys(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	files, err := GenerateKeys(dir)
	if err != nil || len(files) != 4 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 { // there the folder's descriptor decides
			t.Errorf("%s: %v %v", file, info.Mode(), err)
		}
	}
	// One key is enough to refuse, and then none is written.
	for _, file := range files[1:] {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	first, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := GenerateKeys(dir); err == nil {
		t.Error("keys were made beside one that is there")
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left %v", entries)
	}
	if now, _ := os.ReadFile(files[0]); !bytes.Equal(now, first) {
		t.Error("a key was overwritten")
	}
	if err := os.WriteFile(filepath.Join(dir, "root-2.pem"), first, 0o600); err != nil {
		t.Fatal(err)
	}
	keys, err := LoadKeys(dir)
	if err != nil || len(keys[metadata.ROOT]) != 2 || len(keys) != 1 {
		t.Errorf("%d keys (%v)", len(keys[metadata.ROOT]), err)
	}
	for name, text := range map[string]string{"no PEM": "x", "other PEM": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
		"no key": "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "long": strings.Repeat("x", maxKeyFile+1)} {
		if err := os.WriteFile(filepath.Join(dir, "root-2.pem"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKeys(dir); err == nil || !strings.Contains(err.Error(), "root-2.pem") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := LoadKeys(t.TempDir()); err == nil {
		t.Error("an empty folder has keys")
	}
}

// TestOtherSequence: verify names a release whose image was made with another
// sequence or for another base: every device would refuse it.
func TestOtherSequence(t *testing.T) {
	f := newFixture(t)
	image, stamp := hotpatchImage(t, 1, 100, 0)
	for id, b := range map[string][]byte{"ACME-3": containerOf(t, "ACME-3", 3, image, stamp), "ACME-4": containerOf(t, "ACME-4", 1, image, stamp+1)} {
		if _, err := Publish(f.dir, f.keys, [][]byte{b}, f.options()); err != nil {
			t.Fatal(id, err)
		}
	}
	r, err := Verify(f.dir, f.now)
	if err != nil || len(r.Releases) != 3 || r.Problems() != 2 || r.Releases[0].Problem != "" ||
		!strings.Contains(r.Releases[1].Problem, "the release has sequence 3, but the hotpatch image, images/app-1.dll in it, was made with sequence 1") ||
		!strings.Contains(r.Releases[2].Problem, "time stamp") {
		t.Errorf("%+v %v", r, err)
	}
}

// TestEndsSoon: what ends within a quarter of its time is named by verify, with
// the command, and that command renews it; what has ended is said by publish.
func TestEndsSoon(t *testing.T) {
	f := newFixture(t)
	warnings := func(at time.Time) []string {
		t.Helper()
		r, err := Verify(f.dir, at)
		if err != nil {
			t.Fatal(err)
		}
		return r.Warnings
	}
	if w := warnings(start.Add(22 * 24 * time.Hour)); len(w) != 0 {
		t.Errorf("early: %q", w)
	}
	if w := warnings(start.Add(23 * 24 * time.Hour)); len(w) != 1 || w[0] != "timestamp.json ends 10 Dec 2026 12:00 UTC, in 7 days: run hotpatch-build refresh with snapshot.pem and timestamp.pem in KEYS" {
		t.Errorf("in time: %q", w)
	}
	f.now = start.Add(31 * 24 * time.Hour)
	res, err := Publish(f.dir, f.keys, [][]byte{container(t, "ACME-1", 1, 5000)}, f.options())
	if err != nil || res.Changed || len(res.Unchanged) != 1 || len(res.Warnings) != 1 ||
		res.Warnings[0] != "timestamp.json ended 10 Dec 2026 12:00 UTC, and devices take nothing new: run hotpatch-build refresh with snapshot.pem and timestamp.pem in KEYS" {
		t.Errorf("a known release into an expired repository: %+v %v", res, err)
	}
	f.now = start.Add(longExpires - renewBefore + time.Hour)
	online := Keys{metadata.SNAPSHOT: f.keys[metadata.SNAPSHOT], metadata.TIMESTAMP: f.keys[metadata.TIMESTAMP]}
	if _, err := Refresh(f.dir, online, f.options()); err != nil {
		t.Fatal(err)
	}
	if w := warnings(f.now); len(w) != 2 || !strings.Contains(w[0], "targets.json ends") || !strings.Contains(w[1], "root.json ends") || !strings.Contains(w[1], "root.pem") {
		t.Errorf("the long ones: %q", w)
	}
	if _, err := Refresh(f.dir, f.keys, f.options()); err != nil {
		t.Fatal(err)
	}
	if w := warnings(f.now); len(w) != 0 {
		t.Errorf("renewed: %q", w)
	}
	// 12 hours are short, but not soon after they began.
	opts := f.options()
	opts.Expires = 12 * time.Hour
	if res, err := Refresh(f.dir, online, opts); err != nil || len(res.Warnings) != 0 {
		t.Errorf("%+v %v", res, err)
	}
}
