// Package patcher puts the functions of a hotpatch image in place of those of
// a base image inside one process, and takes them out again.
//
// The order never changes: identify, then plan, then act; the journal before
// the effect, the outcome after it. Images and Prepare read only. Apply, Undo
// and Recover stage memory while the threads run and write live code under one
// short freeze; swap.go is the only file that writes it. Memory is the truth,
// a Record is a note about it: Recover and Adopt bring the two together.
//
// What may never happen: a byte of live code written that was not read and
// recognised under the same freeze; a thread released into the middle of a
// written instruction; annex memory given back that a thread may still run in
// or return to; a process left with some functions old and some new, but for
// our own death between two writes, which Recover mends before anything else.
package patcher
