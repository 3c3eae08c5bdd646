// Package house holds the one test of the structure: which room imports which,
// and which modules the daemon, running as root, links.
package house
