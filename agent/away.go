package agent

import (
	"encoding/json"
	"sync/atomic"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
)

// alarmAfter is how long a device may be away from its repository before that
// is called wrong: a weekend and a day. Until then status tells it, and nothing
// else does.
const alarmAfter = 3 * 24 * time.Hour

// outside is the way to the repository.
type outside struct {
	contact contact
	soon    chan struct{}             // something woke this machine: ask soon
	woken   time.Time                 // of the last check that came of it; checkRegularly's own
	spread  time.Duration             // within which a check comes of it
	least   time.Duration             // between two that do
	due     atomic.Pointer[time.Time] // when the repository is asked next; nil: nobody asks by himself
}

// contact is what is kept over restarts: a device that is switched off each
// evening is away as long as another.
type contact struct {
	Checked time.Time `json:"checked"` // last check that succeeded, zero if none ever did
	Tried   time.Time `json:"tried"`   // first check that failed, where none ever succeeded
	// Code is why the last check failed, "" if it did not, and Since when that began.
	Code  string    `json:"code,omitempty"`
	Since time.Time `json:"since,omitzero"`
}

// openOutside takes what is known of former lives.
func (a *Agent) openOutside() {
	a.outside.soon = make(chan struct{}, 1)
	a.outside.spread, a.outside.least = wokenSpread, wokenLeast
	if every := a.o.Config.Repository.CheckEvery; every < 10*wokenSpread {
		a.outside.spread, a.outside.least = every/10, every/5
	}
	a.store.View(func(tx *store.Tx) error {
		if b, ok := tx.Get(settingContact); ok {
			return json.Unmarshal(b, &a.outside.contact)
		}
		return nil
	})
	a.checkedAt = a.outside.contact.Checked
}

// asked notes how a check ended, and mends what was noted while the clock was
// ahead: an alarm would else wait for that day. It belongs to the loop.
func (a *Agent) asked(floors repository.Floors, failed bool) error {
	c, now := a.outside.contact, a.o.Now()
	for _, at := range []*time.Time{&c.Checked, &c.Tried} {
		if at.After(now) {
			*at = now
		}
	}
	switch {
	case !failed:
		c = contact{Checked: now}
	case c.Checked.IsZero() && c.Tried.IsZero():
		c.Tried = now
	}
	if c.Code, c.Since = "", (time.Time{}); a.repoErr != nil { // a clock in doubt fails nothing, and is trouble
		c.Code, c.Since = a.repoErr.Code, a.repoErr.Since.Time
	}
	a.outside.contact = c
	return a.update(func(tx *store.Tx) error {
		if err := setting(tx, settingFloors, floors); err != nil {
			return err
		}
		if err := mendHalts(tx, now); err != nil {
			return err
		}
		return setting(tx, settingContact, c)
	})
}

// astray tells whether what is wrong with the repository is to alarm somebody.
func (a *Agent) astray(now time.Time) bool {
	switch {
	case a.repoErr == nil:
		return false
	case !repository.Passing(a.repoErr.Code):
		return true
	}
	c := a.outside.contact
	last := c.Checked
	if last.IsZero() {
		last = c.Tried
	}
	return !last.IsZero() && now.Sub(last) >= alarmAfter
}

// asks is when the repository is asked next by itself, zero if that is not known
// or is now. It may be called from any goroutine.
func (a *Agent) asks() time.Time {
	at := a.outside.due.Load()
	if at == nil {
		return time.Time{}
	}
	left := time.Until(*at)
	if left <= 0 {
		return time.Time{}
	}
	return a.o.Now().Add(left)
}

// polled tells whether there is a repository to be asked.
func (a *Agent) polled() bool { return a.client != nil && a.o.Config.Repository.URL != "" }

// noRepository says to the owner of the configuration what to do without one.
func (a *Agent) noRepository() string {
	file := a.o.Config.File
	if file == "" {
		file = "the configuration"
	}
	return "set [repository] url and root in " + file + ", then restart the daemon; or hotpatch install FILE"
}

// unpolled says why nobody can be asked. Without a client repoErr stands since
// before the loop began, so that any goroutine may read it.
func (a *Agent) unpolled() *control.Error {
	if a.o.Config.Repository.URL != "" && a.repoErr != nil {
		return control.Errorf(control.CodeUnavailable, "the repository cannot be asked: %s", a.repoErr.Text)
	}
	return &control.Error{Code: control.CodeUnavailable, Text: "no repository is configured", Hint: a.noRepository()}
}

// attendRepository says what is wrong with the repository, if anything is.
func (a *Agent) attendRepository(now time.Time, add func(code, severity, text, remedy string, since control.Time, scope control.Scope)) {
	public := control.Scope{Public: true}
	switch {
	case a.astray(now) && a.client == nil:
		add("repository", control.SeverityWarning, "repository: "+a.repoErr.Text, "hotpatchd check-config looks at it; applied fixes stay", a.repoErr.Since, public)
	case a.astray(now):
		add("repository", control.SeverityWarning, "repository: "+a.repoErr.Text, "applied fixes stay; it is tried again by itself", a.repoErr.Since, public)
	case a.o.Config.Repository.URL == "" && !a.verified:
		add("no-repository", control.SeverityWarning, "no repository is configured", a.noRepository(), control.At(now), public)
	}
}

// fail notes why a check failed; the same trouble stands since it began, in this
// life or a former one.
func (a *Agent) fail(e *control.RepositoryError) (news bool) {
	if news = a.repoErr == nil || a.repoErr.Code != e.Code; !news {
		e.Since = a.repoErr.Since
	} else if c := a.outside.contact; a.repoErr == nil && c.Code == e.Code && !c.Since.IsZero() {
		e.Since = control.At(c.Since)
	}
	a.repoErr = e
	return news
}
