package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf16"
	"unsafe"

	"golang.org/x/sys/windows"
	"golang.org/x/sys/windows/registry"

	"hotpatchd/agent"
	"hotpatchd/agent/control"
)

// testKey is a key of our own beside the real one, for one test.
func testKey(t *testing.T) registryPolicy {
	t.Helper()
	p := registryPolicy{fmt.Sprintf(`SOFTWARE\Policies\hotpatchd-test-%d`, os.Getpid())}
	t.Cleanup(func() { removeKey(t, p.key) })
	return p
}

func removeKey(t *testing.T, key string) {
	t.Helper()
	k, err := registry.OpenKey(registry.LOCAL_MACHINE, key, registry.ALL_ACCESS)
	if err != nil {
		return
	}
	below, _ := k.ReadSubKeyNames(0)
	k.Close()
	for _, b := range below {
		removeKey(t, key+`\`+b)
	}
	if err := registry.DeleteKey(registry.LOCAL_MACHINE, key); err != nil {
		t.Error(err)
	}
}

func setValue(t *testing.T, key, name string, v any) {
	t.Helper()
	k, _, err := registry.CreateKey(registry.LOCAL_MACHINE, key, registry.ALL_ACCESS)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	switch v := v.(type) {
	case nil:
		err = k.DeleteValue(name)
	case string:
		err = k.SetStringValue(name, v)
	case int:
		err = k.SetDWordValue(name, uint32(v))
	case uint64:
		err = k.SetQWordValue(name, v)
	case []string:
		err = k.SetStringsValue(name, v)
	case []byte:
		err = k.SetBinaryValue(name, v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestRegistrySettings(t *testing.T) {
	p := testKey(t)
	if all, err := p.Settings(); err != nil || len(all) != 0 {
		t.Errorf("no key: %v, %v", all, err)
	}
	setValue(t, p.key, "mode", "manual")
	setValue(t, p.key, "enrolled", 1)
	setValue(t, p.key, "hold", []string{"A", "B ü"})
	setValue(t, p.key, "deny", []string{})
	setValue(t, p.key, "ring", uint64(7))
	setValue(t, p.key, "waive", []byte{1})
	setValue(t, p.key, "repository.url", "")
	all, err := p.Settings()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]agent.Setting{}
	for _, s := range all {
		got[s.Name] = s
	}
	want := map[string]agent.Setting{
		"mode": {Name: "mode", Type: "REG_SZ", Value: "manual"}, "enrolled": {Name: "enrolled", Type: "REG_DWORD", Value: uint32(1)},
		"hold": {Name: "hold", Type: "REG_MULTI_SZ", Value: []string{"A", "B ü"}}, "deny": {Name: "deny", Type: "REG_MULTI_SZ", Value: []string{}},
		"ring": {Name: "ring", Type: "REG_QWORD"}, "waive": {Name: "waive", Type: "REG_BINARY"},
		"repository.url": {Name: "repository.url", Type: "REG_SZ", Value: ""},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v\nwant %v", got, want)
	}
	// Through to the policy: the error names key and type.
	_, _, err = agent.LoadManagedPolicy(filepath.Join(t.TempDir(), "none"), p)
	if err == nil || !strings.Contains(err.Error(), `HKLM\`+p.key+", ring: must be REG_DWORD, not REG_QWORD") {
		t.Errorf("got %v", err)
	}
	setValue(t, p.key, "hold", []string{"A", "B"})
	setValue(t, p.key, "ring", 7)
	setValue(t, p.key, "waive", []string{"vbs"})
	loaded, _, err := agent.LoadManagedPolicy(filepath.Join(t.TempDir(), "none"), p)
	if err != nil || loaded.Mode != agent.Manual || loaded.Ring != 7 || len(loaded.Hold) != 2 || loaded.Absent {
		t.Errorf("%+v, %v", loaded, err)
	}
	setValue(t, p.key, "mode", strings.Repeat("x", maxPolicyValue))
	if _, err := p.Settings(); err == nil || !strings.Contains(err.Error(), ", mode: has ") {
		t.Errorf("a huge value: %v", err)
	}
	setValue(t, p.key, "mode", nil)
	setValue(t, p.key+`\repository`, "url", "https://x")
	if _, err := p.Settings(); err == nil || !strings.Contains(err.Error(), `\repository: keys below are not read`) {
		t.Errorf("a key below: %v", err)
	}
}

// rawValue writes a value of any type and content.
func rawValue(t *testing.T, key, name string, kind uint32, b []byte) {
	t.Helper()
	k, _, err := registry.CreateKey(registry.LOCAL_MACHINE, key, registry.ALL_ACCESS)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	n, err := windows.UTF16PtrFromString(name)
	if err != nil {
		t.Fatal(err)
	}
	var p *byte
	if len(b) > 0 {
		p = &b[0]
	}
	set := windows.NewLazySystemDLL("advapi32.dll").NewProc("RegSetValueExW")
	if r, _, _ := set.Call(uintptr(k), uintptr(unsafe.Pointer(n)), 0, uintptr(kind), uintptr(unsafe.Pointer(p)), uintptr(len(b))); r != 0 {
		t.Fatal(syscall.Errno(r))
	}
}

// No text of a list is dropped silently, and no odd length stops us.
func TestRegistryLists(t *testing.T) {
	p := testKey(t)
	for _, c := range []struct {
		text string
		want []string
		err  string
	}{
		{"", []string{}, ""}, {"\x00", []string{}, ""}, {"\x00\x00", []string{}, ""}, {"A", []string{"A"}, ""}, {"A\x00", []string{"A"}, ""},
		{"A\x00B\x00\x00", []string{"A", "B"}, ""}, {"A\x00B", []string{"A", "B"}, ""}, {"A\x00\x00\x00", []string{"A"}, ""},
		{"\x00A\x00\x00", nil, ", deny: text 1 is empty and another follows it"},
		{"A\x00\x00B\x00\x00", nil, ", deny: text 2 is empty and another follows it"},
	} {
		var b []byte
		for _, u := range utf16.Encode([]rune(c.text)) {
			b = append(b, byte(u), byte(u>>8))
		}
		rawValue(t, p.key, "deny", registry.MULTI_SZ, b)
		all, err := p.Settings()
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: %v, %v", c.text, all, err)
			}
		case err != nil || len(all) != 1 || !reflect.DeepEqual(all[0].Value, any(c.want)):
			t.Errorf("%q: %v, %v, want %v", c.text, all, err, c.want)
		}
	}
	for _, kind := range []uint32{registry.SZ, registry.EXPAND_SZ, registry.MULTI_SZ} {
		for n := range 4 {
			rawValue(t, p.key, "deny", kind, []byte("\x00\x00A")[:n])
			p.Settings() // some are wrong; none is a crash
		}
	}
}

// Text that ends without a zero, or holds odd bytes, is read as far as it is text.
func TestRegistryText(t *testing.T) {
	for want, b := range map[string][]byte{
		"":       {},
		"a":      {'a', 0},
		"b\x00":  {'b', 0, 0, 0},
		"c":      {'c', 0, 'd'},
		"\ufffd": {0, 0xd8},
		"\x00":   {0, 0},
	} {
		if got := utf16Text(b); got != want {
			t.Errorf("%v: %q, want %q", b, got, want)
		}
	}
}

// TestRegistryIsWatched: the key appears, changes, goes, and comes again.
func TestRegistryIsWatched(t *testing.T) {
	p := testKey(t)
	ctx, cancel := context.WithCancel(t.Context())
	changed, ended := make(chan struct{}, 100), make(chan struct{})
	go func() { p.Watch(ctx, func() { changed <- struct{}{} }); close(ended) }()
	// What comes before the watch has begun is its first look.
	time.Sleep(50 * time.Millisecond)
	followed := func(what string, do func()) {
		t.Helper()
		for len(changed) > 0 {
			<-changed
		}
		do()
		select {
		case <-changed:
		case <-time.After(registryPoll - time.Second): // sooner than a look in any case
			t.Fatalf("%s: not noticed", what)
		}
	}
	followed("appears", func() { setValue(t, p.key, "mode", "manual") })
	followed("changes", func() { setValue(t, p.key, "mode", "automatic") })
	followed("another value", func() { setValue(t, p.key, "enrolled", 1) })
	followed("a value goes", func() { setValue(t, p.key, "enrolled", nil) })
	followed("the key goes", func() { removeKey(t, p.key) })
	followed("and comes again", func() { setValue(t, p.key, "mode", "manual") })
	cancel()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the watch does not end")
	}
}

// TestManagedDaemon: the whole daemon follows the real key, which this test
// leaves as it was.
func TestManagedDaemon(t *testing.T) {
	if all, err := (registryPolicy{policyKey}).Settings(); err != nil || len(all) > 0 {
		t.Skipf("needs a device that nobody manages: %v, %v", all, err)
	}
	t.Cleanup(func() { removeKey(t, policyKey) })
	folder, path := configured(t, "repository = { root = \"root.json\" }\nbackend = { name = \"sim\", scene = \"scene.toml\" }\n")
	put(t, filepath.Join(folder, "scene.toml"), "format = \"hotpatchd-scene/1\"\n")
	put(t, filepath.Join(folder, "policy.toml"), "format = \"hotpatchd-policy/1\"\nmode = \"automatic\"\n")
	pipe := fmt.Sprintf(`\\.\pipe\hotpatchd-managed-%d`, os.Getpid())
	setValue(t, policyKey, "control.socket", pipe)
	setValue(t, policyKey, "enrolled", 1)
	cmd, log := program(t, nil, "run", "--config", path)
	client := control.Dial(pipe)
	defer client.Close()
	setting := func(key string) (s control.Setting) {
		d, err := client.Policy(t.Context())
		if err != nil {
			return s
		}
		for _, x := range append(d.Policy, d.Configuration...) {
			if x.Key == key {
				return x
			}
		}
		return s
	}
	until(t, "the daemon answers on the pipe that is managed", func() bool {
		return setting("control.socket") == control.Setting{Key: "control.socket", Value: fmt.Sprintf("%q", pipe), Source: `HKLM\SOFTWARE\Policies\hotpatchd, control.socket`}
	})
	if got := setting("enrolled"); got.Value != "true" || got.Source != `HKLM\SOFTWARE\Policies\hotpatchd, enrolled` {
		t.Errorf("%+v", got)
	}
	if got := setting("mode"); got.Value != `"automatic"` || got.Source != filepath.Join(folder, "policy.toml")+":2" {
		t.Errorf("%+v", got)
	}
	setValue(t, policyKey, "mode", "manual")
	until(t, "the new word is in force", func() bool { return setting("mode").Value == `"manual"` })
	setValue(t, policyKey, "mode", 3)
	until(t, "the wrong word is said", func() bool {
		d, err := client.Policy(t.Context())
		return err == nil && strings.Contains(d.Problem, `HKLM\SOFTWARE\Policies\hotpatchd, mode: must be REG_SZ, not REG_DWORD`)
	})
	if got := setting("mode"); got.Value != `"manual"` {
		t.Errorf("the last good word is not in force: %+v", got)
	}
	if code, out, _ := call("check-config", "--config", path); code != exitFailed || !strings.Contains(out, "mode: must be REG_SZ") {
		t.Errorf("check-config: exit %d, %s", code, out)
	}
	if t.Failed() {
		t.Log(log)
	}
	cmd.Process.Kill()
	cmd.Wait()
}
