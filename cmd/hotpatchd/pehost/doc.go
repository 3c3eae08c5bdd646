// Package pehost is a real process that hosts a PE image on Linux, in Go and
// assembly alone: the daemon runs itself again as "hotpatchd pe-host …" when
// it demonstrates on a machine that has nothing else, and tests do likewise.
//
// The image is mapped as a loader maps it, at a random base, and threads call
// one of its exports all the time; whoever patches the process sees the
// results change. It is for images without imports and without an entry point
// that must run: there is no loader lock, no TEB, no unwinding.
//
// The host ends when its standard input closes, so that it never outlives who
// started it.
//
// What it is asked is a line on standard input, what it answers a line on
// standard output:
//
//	(at the start)  ready PID 0xBASE
//	value           value V                     of the last call
//	entry           entry 0xADDRESS             of the export
//	stats           stats CALLS WRONG V=N …     calls so far, how many went wrong, each value seen and how often
//	quit            bye                         and it ends; exit code 1 if anything was wrong
//	anything else   error TEXT
package pehost
