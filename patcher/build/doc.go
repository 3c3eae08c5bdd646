// Package build makes hotpatch images and import libraries from a base image
// and a fix: two ordinary PE DLLs that a compiler and linker produced.
//
// It runs on the author's machine only. Pure: bytes in, bytes out, the same
// bytes for the same input. What could not be patched safely on any device is
// refused here, by a Refusal that names reason, symbol and position; what only
// a device can know (threads, loaded modules, mitigations) is left to package
// patcher. Nothing is guessed: a function whose extent is not certain is refused.
//
// How a fix reaches the base: by a pointer variable __ref_NAME, by an import
// of NAME from the base's own DLL name (exported there or not), by an import
// both have, and by a copy of a base function, which is led back to the base.
package build
