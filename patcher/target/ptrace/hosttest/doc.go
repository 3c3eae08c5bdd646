// Package hosttest starts the PE host of testdata/host for tests: a native
// Linux process that runs the code of a PE image with real threads, counts
// wrong values, and checks its own system calls. It needs a C compiler (gcc)
// and is for linux/amd64; tests that use it say so in their file names.
package hosttest
