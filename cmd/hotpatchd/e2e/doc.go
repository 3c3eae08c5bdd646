// Package e2e tests the daemon from outside: the real program, the real Linux
// backend, real processes that host PE images, a real repository and socket.
package e2e
