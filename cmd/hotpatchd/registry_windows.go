package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/registry"

	"hotpatchd/agent"
)

// policyKey is where group policy and device management set our keys. The
// folder Policies is for administrators only to write to.
const policyKey = `SOFTWARE\Policies\hotpatchd`

const (
	// maxPolicyValues bounds how many values are listed, maxPolicyValue the size
	// of one in bytes: a list of a thousand rules stays below.
	maxPolicyValues = 1000
	maxPolicyValue  = 256 << 10
	// registryPoll is how often the values are looked at in any case: a
	// notification is had for a key that is there only.
	registryPoll = 30 * time.Second
)

// management is device management's word on this device.
func management() agent.Management { return registryPolicy{policyKey} }

// registryPolicy reads a key below HKEY_LOCAL_MACHINE.
type registryPolicy struct{ key string }

// Source implements agent.Management.
func (p registryPolicy) Source() string { return `HKLM\` + p.key }

var registryTypes = map[uint32]string{
	registry.NONE: "REG_NONE", registry.SZ: "REG_SZ", registry.EXPAND_SZ: "REG_EXPAND_SZ", registry.BINARY: "REG_BINARY",
	registry.DWORD: "REG_DWORD", registry.DWORD_BIG_ENDIAN: "REG_DWORD_BIG_ENDIAN", registry.MULTI_SZ: "REG_MULTI_SZ", registry.QWORD: "REG_QWORD",
}

// Settings implements agent.Management.
func (p registryPolicy) Settings() ([]agent.Setting, error) {
	k, err := registry.OpenKey(registry.LOCAL_MACHINE, p.key, registry.QUERY_VALUE|registry.ENUMERATE_SUB_KEYS|registry.WOW64_64KEY)
	if errors.Is(err, windows.ERROR_FILE_NOT_FOUND) || errors.Is(err, windows.ERROR_PATH_NOT_FOUND) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: cannot be opened: %w", p.Source(), err)
	}
	defer k.Close()
	if below, err := k.ReadSubKeyNames(1); len(below) > 0 {
		return nil, fmt.Errorf(`%s\%s: keys below are not read; a key of a table is a value "table.key" of %[1]s`, p.Source(), below[0])
	} else if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: cannot be listed: %w", p.Source(), err)
	}
	names, err := k.ReadValueNames(maxPolicyValues)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: cannot be listed: %w", p.Source(), err)
	}
	var all []agent.Setting
	for _, name := range names {
		s, err := p.setting(k, name)
		if errors.Is(err, windows.ERROR_FILE_NOT_FOUND) {
			continue // just now removed
		}
		if err != nil {
			return nil, fmt.Errorf("%s, %s: %w", p.Source(), name, err)
		}
		all = append(all, s)
	}
	return all, nil
}

func (p registryPolicy) setting(k registry.Key, name string) (agent.Setting, error) {
	// Eight bytes before what is read: Wine looks for the zero that ends a text
	// also before the first byte of one that is shorter than a character.
	b := make([]byte, 8+maxPolicyValue)[8:]
	n, kind, err := k.GetValue(name, b)
	if errors.Is(err, windows.ERROR_MORE_DATA) {
		return agent.Setting{}, fmt.Errorf("has %d bytes, at most %d are read", n, maxPolicyValue)
	}
	if err != nil {
		return agent.Setting{}, fmt.Errorf("cannot be read: %w", err)
	}
	s := agent.Setting{Name: name, Type: registryTypes[kind]}
	if s.Type == "" {
		s.Type = fmt.Sprintf("type %d", kind)
	}
	switch b = b[:n]; kind {
	case registry.SZ:
		text, _, _ := strings.Cut(utf16Text(b), "\x00")
		s.Value = text
	case registry.MULTI_SZ: // texts with a zero after each, and an empty one at the end
		list := strings.Split(strings.TrimRight(utf16Text(b), "\x00"), "\x00")
		if len(list) == 1 && list[0] == "" {
			list = []string{}
		}
		// Taken for the end, it would silently drop what follows: a deny, a hold.
		if i := slices.Index(list, ""); i >= 0 {
			return agent.Setting{}, fmt.Errorf("text %d is empty and another follows it", i+1)
		}
		s.Value = list
	case registry.DWORD:
		if len(b) != 4 {
			return agent.Setting{}, fmt.Errorf("is a REG_DWORD of %d bytes", len(b))
		}
		s.Value = binary.LittleEndian.Uint32(b)
	}
	return s, nil
}

// utf16Text keeps zeros. Whoever wrote the value need not have ended it with one.
func utf16Text(b []byte) string {
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	var out strings.Builder
	for i, part := range splitZero(u) {
		if i > 0 {
			out.WriteByte(0)
		}
		out.WriteString(strings.ToValidUTF8(syscall.UTF16ToString(part), "\ufffd"))
	}
	return out.String()
}

func splitZero(u []uint16) [][]uint16 {
	var parts [][]uint16
	for {
		i := slices.Index(u, 0)
		if i < 0 {
			return append(parts, u)
		}
		parts, u = append(parts, u[:i]), u[i+1:]
	}
}

// Watch implements agent.Management. It keeps a thread of its own: a
// notification ends with the thread that asked for it.
func (p registryPolicy) Watch(ctx context.Context, onChange func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	stop, err := windows.CreateEvent(nil, 1, 0, nil)
	if err != nil {
		p.poll(ctx, onChange)
		return
	}
	defer windows.CloseHandle(stop)
	defer context.AfterFunc(ctx, func() { windows.SetEvent(stop) })()
	changed, err := windows.CreateEvent(nil, 0, 0, nil)
	if err != nil {
		p.poll(ctx, onChange)
		return
	}
	defer windows.CloseHandle(changed)
	for seen := p.seen(); ; {
		asked := p.notify(changed)
		// After the question and before the wait: nothing falls between.
		if now := p.seen(); !reflect.DeepEqual(now, seen) {
			seen = now
			onChange()
		}
		windows.WaitForMultipleObjects([]windows.Handle{stop, changed}, false, uint32(registryPoll.Milliseconds()))
		for _, k := range asked {
			k.Close()
		}
		windows.ResetEvent(changed) // to close a key is a change to its watcher
		if ctx.Err() != nil {
			return
		}
	}
}

// poll is Watch where the system gives us no events.
func (p registryPolicy) poll(ctx context.Context, onChange func()) {
	t := time.NewTicker(registryPoll)
	defer t.Stop()
	for seen := p.seen(); ; {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if now := p.seen(); !reflect.DeepEqual(now, seen) {
			seen = now
			onChange()
		}
	}
}

// look is what was last seen: settings, or why there are none.
type look struct {
	settings []agent.Setting
	err      string
}

func (p registryPolicy) seen() look {
	all, err := p.Settings()
	if err != nil {
		return look{err: err.Error()}
	}
	return look{settings: all}
}

// notify has event set when the key changes, and when it, or the nearest key
// above that is there, appears or goes. What is returned must be closed after that.
func (p registryPolicy) notify(event windows.Handle) (asked []registry.Key) {
	const values = windows.REG_NOTIFY_CHANGE_NAME | windows.REG_NOTIFY_CHANGE_LAST_SET
	filter := uint32(values)
	for path := p.key; ; filter = windows.REG_NOTIFY_CHANGE_NAME {
		k, err := registry.OpenKey(registry.LOCAL_MACHINE, path, registry.NOTIFY|registry.WOW64_64KEY)
		if err == nil {
			if windows.RegNotifyChangeKeyValue(windows.Handle(k), false, filter, event, true) == nil {
				asked = append(asked, k)
			} else {
				k.Close()
			}
			if path != p.key { // a key does not tell of its own end everywhere; the one above does
				return asked
			}
		}
		i := strings.LastIndexByte(path, '\\')
		if i < 0 {
			return asked
		}
		path = path[:i]
	}
}
