//go:build windows

package win32

import "testing"

func TestServiceNumber(t *testing.T) {
	stub := []byte{0x4c, 0x8b, 0xd1, 0xb8, 0x34, 0x12, 0, 0, 0xf6, 0x04, 0x25, 0x08, 0x03, 0xfe, 0x7f, 0x01, 0x75, 0x03}
	with := func(enter ...byte) []byte { return append(append([]byte{0x90, 0x90}, stub...), enter...) }
	for _, c := range []struct {
		name string
		code []byte
		ok   bool
	}{
		{"syscall", with(0x0f, 0x05), true},
		{"int 2e", with(0xcd, 0x2e), true},
		{"a call through a pointer", with(0xff, 0x14, 0x25, 0x00, 0x10, 0xfe, 0x7f), true},
		{"before the syscall", with(), false},
		{"behind it and its ret", with(0x0f, 0x05, 0xc3), false},
		{"no stub", []byte{0x90, 0x90, 0x0f, 0x05}, false},
		{"nothing", nil, false},
	} {
		n, ok := serviceNumber(c.code)
		if ok != c.ok || ok && n != 0x1234 {
			t.Errorf("%s: %#x, %v", c.name, n, ok)
		}
	}
	if len(serviceNames()) < 10 {
		t.Errorf("only %d names of system services are known", len(serviceNames()))
	}
}
