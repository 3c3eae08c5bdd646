package repository

import (
	"errors"
	"fmt"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Codes of Error: stable words that status and logs show.
const (
	CodeOffline     = "offline"        // no way out: no route, or no address for the name
	CodeUnreachable = "unreachable"    // there is a network, but the server is not there, or hangs up
	CodeServer      = "server"         // the server answers, with a failure of its own
	CodeCaptive     = "captive-portal" // a web page came back instead of metadata
	CodeProxy       = "proxy"          // the proxy is not there, or does not let us through
	CodeInspection  = "tls-inspection" // the server's certificate is from an authority that this machine does not trust
	CodeExpired     = "expired"        // metadata ended by this clock
	CodeRollback    = "rollback"       // older than what was trusted before
	CodeSignature   = "signature"      // not signed by the trusted keys, or other bytes than signed ones
	CodeMixed       = "mixed"          // genuine files of different times
	CodeDamaged     = "damaged"        // not metadata at all
	CodeClock       = "clock"          // this clock is far off
	CodeNotFound    = "not-found"      // the server has no such file
	CodeTooSlow     = "too-slow"       // a time-out, or slower than the least speed
	CodeTooLarge    = "too-large"      // longer than signed or sane
	CodeTLS         = "tls"            // no secure connection for another reason
	CodeProxyAuth   = "proxy-auth"     // a proxy wants a login
	CodeStorage     = "storage"        // this device cannot keep what it fetched
	CodeConfig      = "config"         // the settings cannot work
	CodeUnknown     = "unknown-file"   // no trusted metadata names this file
)

// Error is why the repository did not give what was asked. Text is one
// sentence for people, Hint what to do about it ("" if there is nothing).
type Error struct {
	Code string
	Text string
	Hint string
	Err  error // the cause, for logs; may be nil
}

func (e *Error) Error() string { return "repository: " + e.Text }
func (e *Error) Unwrap() error { return e.Err }

func fail(code string, cause error, format string, args ...any) *Error {
	return &Error{Code: code, Text: fmt.Sprintf(format, args...), Err: cause}
}

func (e *Error) hint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// CodeOf is the code of err, "" if it is not ours.
func CodeOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// Passing tells whether a code is what being away from the repository looks
// like: such a device is not wrong, and comes back by itself. What hints at
// tampering, a wrong clock or wrong settings is never among them.
func Passing(code string) bool {
	switch code {
	case CodeOffline, CodeUnreachable, CodeServer, CodeCaptive, CodeProxy, CodeTooSlow:
		return true
	}
	return false
}

const (
	hintStays  = "applied fixes stay"
	hintItself = "it is tried again by itself; applied fixes stay"
)

// day is how sentences give dates, moment how they give what a few hours decide.
func day(t time.Time) string    { return t.UTC().Format("2 Jan 2006") }
func moment(t time.Time) string { return t.UTC().Format("2 Jan 2006 15:04 UTC") }

// explain turns what go-tuf says into the trouble it means. What was verified
// before the failure is in set, what was downloaded last in s.
func (s *session) explain(err error, set *trustedSet) *Error {
	var known *Error
	switch {
	case errors.As(err, &known):
		return known
	case errors.Is(err, &metadata.ErrExpiredMetadata{}):
		name, ended := s.expired(set)
		return fail(CodeExpired, err, "%s ended %s; this clock says %s. Either the publisher has stopped signing or the clock is ahead",
			name, moment(ended), moment(s.at)).hint("compare this clock with another; %s", hintStays)
	case errors.Is(err, &metadata.ErrUnsignedMetadata{}):
		return fail(CodeSignature, err, "%s is not signed by the keys that this device trusts", s.last).hint(hintStays)
	case errors.Is(err, &metadata.ErrBadVersionNumber{}), errors.Is(err, &metadata.ErrLengthOrHashMismatch{}):
		if s.otherVersion(set) {
			return fail(CodeMixed, err, "%s and the metadata that names it are of different times: a mirror half updated, or tampering", s.last).hint(hintStays)
		}
		return fail(CodeSignature, err, "%s is not the file that was signed", s.last).hint(hintStays)
	}
	return fail(CodeDamaged, err, "%s is damaged or is not TUF metadata", s.last).hint(hintStays)
}

// expired finds the metadata whose end made the refresh fail.
func (s *session) expired(set *trustedSet) (string, time.Time) {
	if set.root != nil && s.at.After(set.root.Signed.Expires) {
		return "root.json", set.root.Signed.Expires
	}
	if set.timestamp != nil && s.at.After(set.timestamp.Signed.Expires) {
		return "timestamp.json", set.timestamp.Signed.Expires
	}
	if set.snapshot != nil && s.at.After(set.snapshot.Signed.Expires) {
		return "snapshot.json", set.snapshot.Signed.Expires
	}
	return s.last, headOf(s.got[s.last]).Expires
}

// otherVersion tells whether the file downloaded last is, by its own word, of
// another version than the metadata that names it asked for.
func (s *session) otherVersion(set *trustedSet) bool {
	head := headOf(s.got[s.last])
	switch {
	case head.Type == metadata.SNAPSHOT && set.timestamp != nil:
		return head.Version != metaVersion(set.timestamp.Signed.Meta, "snapshot.json")
	case head.Type == metadata.TARGETS && set.snapshot != nil:
		return head.Version != metaVersion(set.snapshot.Signed.Meta, "targets.json")
	}
	return false
}
