// Package report brings status documents to where a fleet is watched. It builds
// none: it takes documents as bytes, keeps them in a spool on disk until they
// are delivered, and carries them by HTTPS POST, or by whatever else is a
// Carrier, with back-off.
//
// A document goes out after each change and once an interval, at a time of the
// interval that belongs to the device, so that a fleet does not call at once. It
// is delivered at least once, oldest first, under an id made from its bytes: who
// collects tells a second copy by that.
//
// It must never hold up whoever makes the documents: all that waits runs in
// Reporter.Run. It does not log, and what a collector answers changes nothing
// but when the next try comes.
package report
