package repository

import (
	"os"

	"hotpatchd/agent/regular"
)

// openRegular opens a file of a folder in which a publisher may be at work.
func openRegular(path string) (f *os.File, info os.FileInfo, err error) {
	err = patiently(func() (err error) {
		f, info, err = regular.Open(path)
		return err
	})
	return f, info, err
}
