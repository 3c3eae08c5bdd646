// Package sim is a simulated machine: a target.Backend whose processes,
// threads, memory, instruction caches, faults and time are plain values.
//
// It is a backend like the others and passes the same suite. Tests of the
// patcher and the agent run on it, and so do the daemon's demonstration on a
// machine that allows nothing else and the author's trial of a release. It
// proves logic, never an operating system.
//
// A machine is made from a Scene, read from a TOML file (format
// "hotpatchd-scene/1", see Scene) or built in Go. What happens later is done
// with the machine's own methods (Start, Exit, Exec, Fork, LoadModule, …) and
// by faults that strike at the n-th operation.
//
// It is stricter than a kernel where a kernel's mercy hides mistakes: code
// written but not flushed is not what the processor runs; live code written
// while threads run, threads let go inside rewritten bytes, and allocation
// under a freeze are remembered as violations, and Invariant tells of them.
//
// Nothing here sleeps or reads a clock: time is what operations are said to
// cost. The one exception to simulated time is the context handed to Freeze,
// whose end thaws, as on every backend.
package sim
