//go:build !linux

package main

import "os/exec"

// Elsewhere the story is simulated: no children, and nobody in anybody's way.
func endWithUs(*exec.Cmd) {}

func alone() (release func(), err error) { return func() {}, nil }
