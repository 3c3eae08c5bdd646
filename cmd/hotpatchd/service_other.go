//go:build !linux && !windows

package main

import (
	"context"
	"errors"

	"go.uber.org/zap"

	"hotpatchd/agent"
)

// underManager: nothing manages us here.
func underManager(work func(context.Context, func()) error) error { return inForeground(work) }

var errNoManager = errors.New("this system's service manager is not supported: the service is for Linux and Windows")

func (installer) install() (string, error)   { return "", errNoManager }
func (installer) uninstall() (string, error) { return "", errNoManager }
func (installer) start() (string, error)     { return "", errNoManager }
func (installer) stop() (string, error)      { return "", errNoManager }
func (installer) restart() (string, error)   { return "", errNoManager }

// firstOfAll is what main does before anything else: nothing here.
func firstOfAll() error { return nil }

// withEvents adds the system's event log where there is one: the supervisor
// collects what we write.
func withEvents(log *zap.Logger) *zap.Logger { return log }

// checkHands is a question for Windows: here the mode of a file is looked at.
func checkHands(string, ...string) error { return nil }

// management: there is no place here where device management speaks but the files.
func management() agent.Management { return nil }
