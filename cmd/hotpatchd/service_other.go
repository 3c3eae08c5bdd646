//go:build !linux && !windows

package main

import (
	"context"
	"errors"
)

// underManager: nothing manages us here.
func underManager(work func(context.Context, func()) error) error { return inForeground(work) }

var errNoManager = errors.New("this system's service manager is not supported: the service is for Linux and Windows")

func (installer) install() (string, error)   { return "", errNoManager }
func (installer) uninstall() (string, error) { return "", errNoManager }
func (installer) start() (string, error)     { return "", errNoManager }
func (installer) stop() (string, error)      { return "", errNoManager }
func (installer) restart() (string, error)   { return "", errNoManager }
