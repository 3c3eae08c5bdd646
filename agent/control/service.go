package control

import (
	"context"
	"errors"
	"fmt"
)

// Caller is who asks, as the kernel reports it. PID is for the history only: a
// pid can be reused and decides nothing. On Windows UID is SIDNumber of the SID,
// 0 for SYSTEM and who acts as an administrator; GID is -1.
type Caller struct {
	UID, GID, PID int
	User          string // name, or the number (the SID) where there is no name
	SID           string // Windows only
	Admin         bool   // may change things and see all

	groups string // Windows only: the SIDs of the groups in force for him, between spaces
}

// Service is what the daemon offers. The server asks it only for what the
// caller may have, and filters the answer; a Service need not check again.
// Answers are values of the caller from then on: a Service never hands out a
// document that it changes later. The server fills in Headers.
//
// A ctx that ends (the caller has gone, or the server stops) ends the waiting
// only: a change that was begun is carried through or taken back as a whole.
//
// Errors that a user should read are *Error; anything else becomes CodeInternal.
type Service interface {
	Status(ctx context.Context, c Caller) (*Status, error)
	Eligibility(ctx context.Context, c Caller) (*Eligibility, error)
	Offers(ctx context.Context, c Caller) (*Offers, error)
	// Calendar is what is planned, what was released, and what comes next.
	Calendar(ctx context.Context, c Caller) (*Calendar, error)
	Processes(ctx context.Context, c Caller, q ProcessQuery) (*Processes, error)

	// Check refreshes the repository now.
	Check(ctx context.Context, c Caller) (*Status, error)
	Plan(ctx context.Context, c Caller, q PlanQuery) (*Plan, error)
	// Install and Rollback call progress, if not nil, from one goroutine at a
	// time and never after they have returned.
	Install(ctx context.Context, c Caller, r InstallRequest, progress func(Event)) (*Change, error)
	Rollback(ctx context.Context, c Caller, r RollbackRequest, progress func(Event)) (*Change, error)
	Hold(ctx context.Context, c Caller, id, reason string) (*Change, error)
	ReleaseHold(ctx context.Context, c Caller, id, reason string) (*Change, error)
	Pause(ctx context.Context, c Caller) (*Change, error)
	Resume(ctx context.Context, c Caller) (*Change, error)

	Verify(ctx context.Context, c Caller) (*Verify, error)
	// History returns at most limit entries, newest first.
	History(ctx context.Context, c Caller, limit int) (*History, error)
	Explain(ctx context.Context, c Caller, pid int, address uint64) (*Explain, error)
	// Diagnose returns a zip file for a support request.
	Diagnose(ctx context.Context, c Caller) ([]byte, error)
	// Policy is every setting in force and where it comes from.
	Policy(ctx context.Context, c Caller) (*Settings, error)
	// Subscribe returns what happens from now on, until ctx ends; then the
	// channel is closed. A subscriber that does not keep up loses events, never
	// holds up the daemon.
	Subscribe(ctx context.Context, c Caller) (<-chan Event, error)
	// Metrics returns the Prometheus text exposition.
	Metrics(ctx context.Context) ([]byte, error)
}

// ProcessQuery narrows Processes. Zero values mean all.
type ProcessQuery struct {
	PID        int
	Vulnerable bool // only images that are open
}

// PlanQuery asks what a release would do. Empty ID: the one that would be
// installed. A PID adds the places byte by byte.
type PlanQuery struct {
	ID  string
	PID int
}

// InstallRequest names a release by ID, or carries it in File with the files
// of metadata/ that lay beside it, by name without folder.
type InstallRequest struct {
	ID       string            `json:"id"`
	File     []byte            `json:"-"`
	Metadata map[string][]byte `json:"-"`
}

// RollbackRequest takes the release ID out; empty: the one in force.
type RollbackRequest struct {
	ID string `json:"id"`
}

// Event types.
const (
	EventProgress   = "progress"   // of an install or rollback under way
	EventImage      = "image"      // an image has changed its state
	EventState      = "state"      // the device has changed its state
	EventRelease    = "release"    // a release came into force or went out
	EventRepository = "repository" // a check of the repository has ended
	EventAttention  = "attention"  // something a person should know
	EventResult     = "result"     // last line of a stream: Change is the outcome
	EventError      = "error"      // last line of a stream: Error is the outcome
)

// Event is one line of a stream.
type Event struct {
	Header
	Type    string  `json:"type"`
	Time    Time    `json:"time"`
	Text    string  `json:"text"` // one line for a person, without addresses or bytes
	PID     int     `json:"pid,omitempty"`
	Exe     string  `json:"exe,omitempty"`
	Image   string  `json:"image,omitempty"`
	Release string  `json:"release,omitempty"`
	From    string  `json:"from,omitempty"` // former state
	State   string  `json:"state,omitempty"`
	Reason  string  `json:"reason,omitempty"`
	Done    int     `json:"done,omitempty"`  // images done so far
	Total   int     `json:"total,omitempty"` // of so many
	Change  *Change `json:"change,omitempty"`
	Error   *Error  `json:"error,omitempty"`

	Scope Scope `json:"-"` // who else may read it
}

// Code classifies an Error.
type Code string

// The codes.
const (
	CodeUsage        Code = "usage"         // the request makes no sense
	CodeNotPermitted Code = "not-permitted" // not for this caller
	CodeNotFound     Code = "not-found"     // no such release, process, path
	CodeConflict     Code = "conflict"      // not now, not in this state
	CodeNotEligible  Code = "not-eligible"
	CodeIncomplete   Code = "incomplete" // something is still open
	CodeTooLarge     Code = "too-large"
	CodeUnavailable  Code = "unavailable" // not available in this version or on this system
	CodeOverloaded   Code = "overloaded"  // too many connections of this user
	CodeInternal     Code = "internal"
)

// Error is an error for a user: one sentence on what failed and on what, one
// on what to do.
type Error struct {
	Code Code   `json:"code"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"`
}

func (e *Error) Error() string { return e.Text }

// Is matches any *Error with the same code and no text: errors.Is(err, &Error{Code: CodeNotFound}).
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Text == "" && t.Code == e.Code
}

// Errorf makes an Error without a hint.
func Errorf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Text: fmt.Sprintf(format, args...)}
}

// asError turns any error into one for the wire. What is not meant for users
// is still told to administrators, who have to act on it; strangers cannot
// cause one.
func asError(err error) *Error {
	var e *Error
	if errors.As(err, &e) {
		return e
	}
	return &Error{Code: CodeInternal, Text: err.Error()}
}

// httpStatus is the HTTP status that goes with each code. The code in the body
// is what clients decide by.
var httpStatus = map[Code]int{
	CodeUsage:        400,
	CodeNotPermitted: 403,
	CodeNotFound:     404,
	CodeConflict:     409,
	CodeTooLarge:     413,
	CodeNotEligible:  422,
	CodeIncomplete:   424,
	CodeInternal:     500,
	CodeUnavailable:  501,
	CodeOverloaded:   503,
}
