package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Waits of the policy watch.
const (
	policyDebounce = 100 * time.Millisecond // an editor's save is several events
	policyRewatch  = time.Second            // how often a folder that went away is looked for
	policyPoll     = 30 * time.Second       // how often the file is looked at in any case: events can be lost
)

// WatchPolicy calls onChange, from the calling goroutine, once when it begins to
// see changes, for what came before, and whenever the file at
// path may have changed, appeared or gone, until ctx ends. It watches the folder,
// because a watch on a file dies with the first rename over it, and looks at the
// file itself at intervals, because notifications are limited, can overflow, and
// do not follow symbolic links. A call too many is harmless, one that is missed
// would cost at most the interval.
func WatchPolicy(ctx context.Context, path string, onChange func()) {
	w := policyWatch{path: path, folder: filepath.Dir(path), debounce: policyDebounce, rewatch: policyRewatch, poll: policyPoll, started: onChange}
	w.run(ctx, onChange)
}

type policyWatch struct {
	path, folder            string
	debounce, rewatch, poll time.Duration
	started                 func() // called once, when changes begin to be seen; may be nil

	notify  *fsnotify.Watcher // nil: the system gave us none, polling only
	watched os.FileInfo       // the folder that is watched, nil if none
	seen    os.FileInfo       // the file as of the last call, nil if there was none
}

func (w *policyWatch) run(ctx context.Context, onChange func()) {
	var events chan fsnotify.Event
	var failures chan error
	if notify, err := fsnotify.NewWatcher(); err == nil {
		defer notify.Close()
		w.notify, events, failures = notify, notify.Events, notify.Errors
	}
	w.seen, _ = os.Stat(w.path)
	w.follow()
	if w.started != nil {
		w.started()
	}

	poll := time.NewTicker(w.poll)
	defer poll.Stop()
	again := time.NewTicker(w.rewatch)
	defer again.Stop()
	settled := time.NewTimer(w.debounce)
	settled.Stop()
	defer settled.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-events:
			switch {
			case !ok:
				events = nil
			case filepath.Clean(e.Name) == w.folder && e.Has(fsnotify.Remove|fsnotify.Rename):
				w.leave()
				settled.Reset(w.debounce)
			case filepath.Base(e.Name) == filepath.Base(w.path) && e.Op != fsnotify.Chmod:
				settled.Reset(w.debounce)
			}
		case err, ok := <-failures:
			if !ok {
				failures = nil
			} else if errors.Is(err, fsnotify.ErrEventOverflow) {
				settled.Reset(w.debounce) // whatever was lost may have been ours
			}
		case <-settled.C:
			w.seen, _ = os.Stat(w.path)
			onChange()
		case <-again.C:
			if w.notify != nil && w.watched == nil && w.follow() && w.changed() {
				onChange()
			}
		case <-poll.C:
			if now, err := os.Stat(w.folder); w.watched != nil && (err != nil || !os.SameFile(now, w.watched)) {
				w.leave() // another folder stands under the name; "again" finds it
			}
			if w.changed() {
				onChange()
			}
		}
	}
}

// follow begins to watch the folder, if it is there.
func (w *policyWatch) follow() bool {
	if w.notify == nil {
		return false
	}
	if err := w.notify.Add(w.folder); err != nil {
		return false
	}
	info, err := os.Stat(w.folder)
	if err != nil {
		w.leave()
		return false
	}
	w.watched = info
	return true
}

// leave forgets the folder. The watch may be gone already.
func (w *policyWatch) leave() {
	_ = w.notify.Remove(w.folder)
	w.watched = nil
}

// changed compares the file with what it was at the last call.
func (w *policyWatch) changed() bool {
	before := w.seen
	now, err := os.Stat(w.path)
	if err != nil {
		now = nil
	}
	w.seen = now
	if before == nil || now == nil {
		return (before == nil) != (now == nil)
	}
	return !os.SameFile(before, now) || before.Size() != now.Size() || !before.ModTime().Equal(now.ModTime())
}
