package pe

import (
	"errors"
	"fmt"
)

// ErrNot64 is in the chain of the error for a PE32 (32-bit) image.
var ErrNot64 = errors.New("a 32-bit image")

// ErrNotPE is in the chain of the error for bytes that do not begin like a PE
// image at all, so that a scanner can tell "something else" from "damaged".
var ErrNotPE = errors.New("not a PE image")

// FormatError says where an image breaks the format. Where names the structure
// and whether Off counts in the file ("…, file offset") or in the image ("…, rva").
// Failures of the underlying reader are never FormatErrors.
type FormatError struct {
	Off    int64
	Where  string
	Reason string

	kind error // ErrNot64 or ErrNotPE, else nil
}

func (e *FormatError) Error() string { return fmt.Sprintf("%s 0x%x: %s", e.Where, e.Off, e.Reason) }

// Unwrap gives the sentinel, if any.
func (e *FormatError) Unwrap() error { return e.kind }

func badRVA(where string, rva uint32, format string, args ...any) error {
	return &FormatError{Off: int64(rva), Where: where + ", rva", Reason: fmt.Sprintf(format, args...)}
}

func badFile(where string, off int64, format string, args ...any) error {
	return &FormatError{Off: off, Where: where + ", file offset", Reason: fmt.Sprintf(format, args...)}
}

// badHeader is for the headers, where file offset and RVA are the same number.
func (im *Image) badHeader(where string, off int64, format string, args ...any) error {
	if im.Mapped {
		return badRVA(where, uint32(off), format, args...)
	}
	return badFile(where, off, format, args...)
}
