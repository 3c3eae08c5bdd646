package baseline

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
)

// maxXattr bounds the names and each value of extended attributes: xattr(7),
// XATTR_LIST_MAX and XATTR_SIZE_MAX.
const maxXattr = 64 << 10

// refused are attributes that tell of the content, or give rights to it: no new
// content can take them over.
var refused = map[string]string{
	"security.capability": "it runs with capabilities of its own",
	"security.ima":        "its content is signed for the kernel (IMA)",
	"security.evm":        "its content is signed for the kernel (EVM)",
}

// copyXattrs gives a file the extended attributes of another: security context,
// access lists, the users' own. What cannot be kept is an error by name.
func copyXattrs(to *os.File, from string) error {
	names, err := read(func(b []byte) (int, error) { return syscall.Listxattr(from, b) })
	if errors.Is(err, syscall.ENOTSUP) || len(names) == 0 && err == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read its extended attributes: %w", err)
	}
	path := fmt.Sprintf("/proc/self/fd/%d", to.Fd())
	for _, name := range strings.Split(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if why, no := refused[name]; no {
			return fmt.Errorf("%s, %s", why, name)
		}
		value, err := read(func(b []byte) (int, error) { return syscall.Getxattr(from, name, b) })
		if errors.Is(err, syscall.ENODATA) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot read its attribute %s: %w", name, err)
		}
		// The system gives a new file some by itself, and not everybody may write those.
		has, err := read(func(b []byte) (int, error) { return syscall.Getxattr(path, name, b) })
		if err == nil && bytes.Equal(has, value) {
			continue
		}
		if err := syscall.Setxattr(path, name, value, 0); err != nil {
			return fmt.Errorf("cannot give it the attribute %s: %w", name, err)
		}
	}
	return nil
}

func read(get func([]byte) (int, error)) ([]byte, error) {
	b := make([]byte, maxXattr)
	n, err := get(b)
	if err != nil {
		return nil, err
	}
	return b[:n], nil
}
