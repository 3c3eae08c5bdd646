// Package win32 is the Windows backend, on amd64 and arm64.
//
// A process is held by one handle with the right to look and read; rights to
// write, to map, to stop and to start a thread are asked for when they are
// first needed. While the handle is open the system gives its pid to no other
// process, so asking for more never reaches another life.
//
// A freeze uses a process state change object where Windows has one
// (Windows 11): the system takes the stop back when the object's last handle
// closes, whatever becomes of us. Elsewhere each thread is suspended by itself.
// That outlives us, so a guardian, a process of the same program (see
// Guardian), holds a handle of every thread before it is suspended and resumes
// it when we end.
//
// Addresses are reserved in units of 64 KiB here, while the seam maps pages:
// what Alloc reserves around the pages it was asked for is used by the next
// Alloc beside them, is not listed by Regions, and goes back to the system with
// the last page.
//
// A call made in a process runs in a thread of its own, made for it, on a page of
// its own. It harms nothing if we die, has a deadline, and keeps its page if it
// is not back by then.
//
// The stack of a fiber that no thread runs shows in no thread's stack: what a
// program switches by itself it may return to unseen.
//
// How a process ended is told by a handle of it (see follow.go), to those only
// who follow it. That processes start and end is told by an ETW session of our
// own where the system lets us have one: it makes patching fast and nothing else,
// since events are lost. It was written from evntrace.h, evntcons.h and the
// manifest of Microsoft-Windows-Kernel-Process, and was never run on Windows itself:
// Wine has no such sessions.
//
// # What a stop does to a program
//
// Nothing: a suspended thread's waits go on and end when they would have ended.
// Only time passes.
package win32
