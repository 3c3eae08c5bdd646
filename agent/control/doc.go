// Package control is the daemon's interface to the people of one machine: the
// documents they read, the calls they make, and HTTP over a local socket that
// carries both.
//
// It takes bytes, never paths: whatever file a caller names was opened by the
// caller. The peer's credentials, as the kernel reports them, decide:
// uid 0 and members of one configured group may change things and see all;
// anyone else reads what filter.go copies for them, and nothing else. A document, a
// field or a route that filter.go and the route table do not name does not
// reach a stranger.
//
// Every document begins with its format name and version. Keys are stable and
// consumers ignore keys they do not know; requests with unknown keys are refused.
package control
