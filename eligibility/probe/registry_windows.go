package probe

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"syscall"
	"unsafe"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/registry"
)

// maxRegistry bounds one value that is read, in bytes; real ones are below 1 KiB.
const maxRegistry = 16 << 10

// localMachine reads HKEY_LOCAL_MACHINE, of which 32-bit programs see another one.
type localMachine struct{}

// notThere says what is not there; it is fs.ErrNotExist.
type notThere struct{ what string }

func (e *notThere) Error() string   { return "there is no " + e.what }
func (e *notThere) Is(t error) bool { return t == fs.ErrNotExist }

func open(key string, access uint32) (registry.Key, error) {
	k, err := registry.OpenKey(registry.LOCAL_MACHINE, key, access|registry.WOW64_64KEY)
	if errors.Is(err, windows.ERROR_FILE_NOT_FOUND) || errors.Is(err, windows.ERROR_PATH_NOT_FOUND) {
		return 0, &notThere{`key HKLM\` + key}
	}
	if err != nil {
		return 0, fmt.Errorf(`cannot open HKLM\%s: %w`, key, err)
	}
	return k, nil
}

// value reads a value as it is.
func value(key, name string) ([]byte, uint32, error) {
	k, err := open(key, registry.QUERY_VALUE)
	if err != nil {
		return nil, 0, err
	}
	defer k.Close()
	b := make([]byte, maxRegistry)
	n, kind, err := k.GetValue(name, b)
	switch {
	case errors.Is(err, windows.ERROR_FILE_NOT_FOUND):
		return nil, 0, &notThere{fmt.Sprintf(`value %s in HKLM\%s`, name, key)}
	case errors.Is(err, windows.ERROR_MORE_DATA):
		return nil, 0, fmt.Errorf(`HKLM\%s, %s has %d bytes, at most %d are read`, key, name, n, maxRegistry)
	case err != nil:
		return nil, 0, fmt.Errorf(`cannot read HKLM\%s, %s: %w`, key, name, err)
	}
	return b[:n], kind, nil
}

// typeNames are those of winnt.h.
var typeNames = map[uint32]string{
	registry.NONE: "REG_NONE", registry.SZ: "REG_SZ", registry.EXPAND_SZ: "REG_EXPAND_SZ", registry.BINARY: "REG_BINARY",
	registry.DWORD: "REG_DWORD", registry.DWORD_BIG_ENDIAN: "REG_DWORD_BIG_ENDIAN", registry.MULTI_SZ: "REG_MULTI_SZ", registry.QWORD: "REG_QWORD",
}

func wrongType(key, name string, kind, want uint32) error {
	is := typeNames[kind]
	if is == "" {
		is = fmt.Sprintf("type %d", kind)
	}
	return fmt.Errorf(`HKLM\%s, %s is %s, not %s`, key, name, is, typeNames[want])
}

// Text implements hive.
func (localMachine) Text(key, name string) (string, error) {
	b, kind, err := value(key, name)
	if err != nil {
		return "", err
	}
	if kind != registry.SZ {
		return "", wrongType(key, name, kind, registry.SZ)
	}
	// Whoever wrote it need not have ended it with a zero.
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = uint16(b[2*i]) | uint16(b[2*i+1])<<8
	}
	return syscall.UTF16ToString(u), nil
}

// Number implements hive.
func (localMachine) Number(key, name string) (uint64, error) {
	b, kind, err := value(key, name)
	if err != nil {
		return 0, err
	}
	if kind != registry.DWORD {
		return 0, wrongType(key, name, kind, registry.DWORD)
	}
	if len(b) != 4 {
		return 0, fmt.Errorf(`HKLM\%s, %s is a REG_DWORD of %d bytes`, key, name, len(b))
	}
	return uint64(*(*uint32)(unsafe.Pointer(&b[0]))), nil
}

// Keys implements hive.
func (localMachine) Keys(key string) ([]string, error) {
	k, err := open(key, registry.ENUMERATE_SUB_KEYS)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	names, err := k.ReadSubKeyNames(maxEnrolments + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf(`cannot list HKLM\%s: %w`, key, err)
	}
	return names, nil
}
