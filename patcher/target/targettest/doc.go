// Package targettest is the one suite that every backend passes. A backend's
// own test starts victims and hands them over in a Setup; what is true of a
// target.Backend is said here and nowhere else.
//
// A victim that cannot do what a case needs leaves that case out with a reason:
// cases left out are counted and named at the end, and with
// HOTPATCH_TEST_ALL=1 each one that Setup.Lacks does not declare is a failure.
//
// No case asserts a time. A case waits for a condition, at most Patience.
package targettest
