// Package winhosttest builds and drives the Windows program of testdata/winhost,
// whose code the win32 backend changes in tests.
package winhosttest
