package repository

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Fetch returns the bytes of a release that a catalog of this client names:
// from the cache if they are there and still have the signed hash, else from
// the repository. A download that was cut short goes on where it stopped, also
// after a restart. Errors are *Error; what came so far is kept for the next try.
func (c *Client) Fetch(ctx context.Context, o Offer) ([]byte, error) {
	c.fetching.Lock()
	defer c.fetching.Unlock()
	if b, err := os.ReadFile(c.cache.target(o.SHA256)); err == nil {
		if matches(o, b) {
			return b, nil
		}
		if err := c.cache.aside(c.cache.target(o.SHA256), errors.New("not the bytes that were signed")); err != nil {
			return nil, err
		}
	}
	ctx, stop := context.WithTimeout(ctx, c.transport.limits.payload)
	defer stop()
	var err error
	for try := range c.transport.limits.attempts {
		if try > 0 && !pause(ctx, c.transport.limits.pause) {
			break
		}
		var b []byte
		var resumed bool
		if b, resumed, err = c.download(ctx, o); err == nil {
			return b, nil
		}
		// What an earlier attempt left may be bad; what came in one piece is as the server has it.
		if code := CodeOf(err); code == CodeCaptive || !Passing(code) && !(code == CodeSignature && resumed) {
			break
		}
	}
	return nil, err
}

// pause waits d, or less once ctx is over; it tells whether to go on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// download is one attempt: the rest of the .part file, the check, and then the
// name that says it is whole. resumed tells that an earlier attempt had begun it.
func (c *Client) download(ctx context.Context, o Offer) (b []byte, resumed bool, err error) {
	part := c.cache.target(o.SHA256 + ".part")
	resumed, err = c.fillPart(ctx, o, part)
	if err != nil {
		if code := CodeOf(err); code == CodeStorage || code == CodeTooLarge || code == CodeCaptive {
			os.Remove(part) // nothing to resume, and the space may be needed
		}
		return nil, resumed, err
	}
	b, err = os.ReadFile(part)
	if err != nil {
		return nil, resumed, storage(err)
	}
	if int64(len(b)) < o.Length {
		return nil, resumed, fail(CodeUnreachable, io.ErrUnexpectedEOF, "%s ended after %d of %d bytes", o.Target, len(b), o.Length).hint(hintStays)
	}
	if !matches(o, b) {
		os.Remove(part)
		return nil, resumed, fail(CodeSignature, &metadata.ErrLengthOrHashMismatch{Msg: o.Target},
			"%s is not the file that was signed: its hash differs", o.Target).hint(hintStays)
	}
	if err := patiently(func() error { return os.Rename(part, c.cache.target(o.SHA256)) }); err != nil {
		return nil, resumed, storage(err)
	}
	if err := syncDir(c.cache.target("")); err != nil {
		return nil, resumed, storage(err)
	}
	return b, resumed, nil
}

// fillPart appends to the .part file what it lacks, and makes it last.
func (c *Client) fillPart(ctx context.Context, o Offer, part string) (resumed bool, err error) {
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return false, storage(err)
	}
	defer func() {
		if closeErr := f.Close(); err == nil && closeErr != nil {
			err = storage(closeErr)
		}
	}()
	w := &counted{w: f, total: o.Length, progress: c.cfg.Progress}
	restart := func() error {
		if err := f.Truncate(0); err != nil {
			return storage(err)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return storage(err)
		}
		w.done = 0
		return nil
	}
	if w.done, err = f.Seek(0, io.SeekEnd); err != nil {
		return false, storage(err)
	}
	resumed = w.done > 0
	if w.done < o.Length {
		err = c.transport.read(ctx, "targets/"+targetFile(o.Target, o.SHA256), w.done, o.Length, w, restart)
		if w.err != nil {
			return resumed, storage(w.err)
		}
		if err != nil {
			return resumed, err
		}
	}
	if err := f.Sync(); err != nil {
		return resumed, storage(err)
	}
	return resumed, nil
}

// counted passes on what is written and tells how far it got. err is the
// writer's own failure, which io.Copy would not tell from the reader's.
type counted struct {
	w           io.Writer
	done, total int64
	progress    func(done, total int64)
	err         error
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.done += int64(n)
	if err != nil {
		c.err = err
	} else if c.progress != nil {
		c.progress(min(c.done, c.total), c.total)
	}
	return n, err
}

func matches(o Offer, b []byte) bool {
	sum := sha256.Sum256(b)
	return int64(len(b)) == o.Length && hex.EncodeToString(sum[:]) == o.SHA256
}

// Prune removes cached releases whose hash keep refuses, and downloads that
// were never finished. It touches nothing that was applied.
func (c *Client) Prune(keep func(sha256 string) bool) error {
	c.fetching.Lock()
	defer c.fetching.Unlock()
	entries, err := os.ReadDir(c.cache.target(""))
	if err != nil {
		return storage(err)
	}
	for _, e := range entries {
		if !keep(e.Name()) {
			if err := patiently(func() error { return os.Remove(c.cache.target(e.Name())) }); err != nil {
				return storage(err)
			}
		}
	}
	return nil
}

// VerifyFile tells which offer a lone release file is: trusted metadata that
// has not ended must name its length and hash.
func (c *Client) VerifyFile(b []byte) (Offer, error) {
	catalog, err := c.Cached()
	if err != nil {
		return Offer{}, err
	}
	o, err := find(catalog.Offers, b)
	if err != nil {
		return Offer{}, err
	}
	if now := c.cfg.Now(); catalog.Ended(now) {
		return Offer{}, fail(CodeExpired, nil, "the metadata that names %s ended %s; this clock says %s", o.ID, moment(catalog.Expires), moment(now)).
			hint("hotpatch check")
	}
	return o, nil
}

// VerifyWithMetadata tells which offer a release file is by metadata that lies
// beside it: the folder must verify from root, the newest root this device
// trusts, must not have ended at now, and must not be older than floors.
func VerifyWithMetadata(root []byte, dir fs.FS, b []byte, floors Floors, now time.Time) (Offer, error) {
	set, _, err := verify(root, folderSource(dir), now)
	if err == nil {
		err = floors.check(set)
	}
	if err != nil {
		return Offer{}, err
	}
	offers, _, err := readOffers(set.targets.Signed.Targets)
	if err != nil {
		return Offer{}, err
	}
	return find(offers, b)
}

func find(offers []Offer, b []byte) (Offer, error) {
	for _, o := range offers {
		if matches(o, b) {
			return o, nil
		}
	}
	return Offer{}, fail(CodeUnknown, nil, "no trusted metadata names a file of %d bytes with the hash %x", len(b), sha256.Sum256(b)).
		hint("hotpatch check, or put the repository's metadata folder beside the file")
}

// folderSource reads metadata files from a folder.
func folderSource(dir fs.FS) source {
	return func(name string, limit int64) ([]byte, error) {
		info, err := fs.Stat(dir, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fail(CodeNotFound, err, "there is no %s", name)
		case err != nil:
			return nil, fail(CodeUnreachable, err, "cannot read %s: %s", name, reason(err))
		case !info.Mode().IsRegular():
			return nil, fail(CodeUnreachable, nil, "cannot read %s: not a file", name)
		case info.Size() > limit:
			return nil, tooLarge(name, limit)
		}
		f, err := dir.Open(name)
		if err != nil {
			return nil, fail(CodeUnreachable, err, "cannot read %s: %s", name, reason(err))
		}
		defer f.Close()
		var buf bytes.Buffer
		if _, err := io.Copy(&buf, io.LimitReader(f, limit+1)); err != nil {
			return nil, fail(CodeUnreachable, err, "cannot read %s: %s", name, reason(err))
		}
		return buf.Bytes(), nil
	}
}
