//go:build !unix

package repository

import "errors"

func mkfifo(string) error { return errors.New("this system has none") }
