//go:build linux && amd64

package ptrace

import (
	"bytes"
	"strings"

	"hotpatchd/patcher/target"
)

// maxRegions bounds what one process may make us hold. vm.max_map_count is
// 65530 by default; a process with more than this is refused, not cut short.
const maxRegions = 1 << 20

// parseMaps reads /proc/PID/maps (proc_pid_maps(5)) into dst. The file is made
// while the process runs: a line that overlaps the one before is dropped. Each
// region that lies on a file system is told to on, if that is not nil.
func parseMaps(b []byte, dst []target.Region, on func(r *target.Region, d device)) ([]target.Region, bool) {
	var last string // most lines repeat the path of the line before
	for len(b) > 0 {
		line := b
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			line, b = b[:i], b[i+1:]
		} else {
			b = nil
		}
		var r target.Region
		start, line, ok1 := hexField(line, '-')
		end, line, ok2 := hexField(line, ' ')
		if !ok1 || !ok2 || end <= start || len(line) < 5 || line[4] != ' ' {
			return dst, false
		}
		r.Start, r.End = target.Addr(start), target.Addr(end)
		if line[0] == 'r' {
			r.Prot |= target.Read
		}
		if line[1] == 'w' {
			r.Prot |= target.Write
		}
		if line[2] == 'x' {
			r.Prot |= target.Exec
		}
		r.Shared = line[3] == 's'
		offset, line, ok1 := hexField(line[5:], ' ')
		major, line, ok2 := hexField(line, ':')
		minor, line, ok3 := hexField(line, ' ')
		if !ok1 || !ok2 || !ok3 {
			return dst, false
		}
		r.Offset = offset
		for len(line) > 0 && line[0] >= '0' && line[0] <= '9' {
			r.Inode = r.Inode*10 + uint64(line[0]-'0')
			line = line[1:]
		}
		name := bytes.TrimLeft(line, " ")
		if string(name) != last {
			last = string(name)
		}
		classify(&r, last)
		if n := len(dst); n > 0 && r.Start < dst[n-1].End {
			continue
		}
		if len(dst) == maxRegions {
			return dst, false
		}
		dst = append(dst, r)
		if on != nil && (major|minor|r.Inode) != 0 {
			on(&dst[len(dst)-1], makeDevice(major, minor))
		}
	}
	return dst, true
}

func classify(r *target.Region, name string) {
	switch {
	case name == "[heap]":
		r.Kind = target.Heap
	case name == "[stack]":
		r.Kind = target.Stack
	case strings.HasPrefix(name, "[anon"):
		r.Kind = target.Private // named by prctl(PR_SET_VMA_ANON_NAME)
	case strings.HasPrefix(name, "["):
		r.Kind = target.Special // vdso, vvar, vsyscall, uprobes, …
	case r.Inode != 0 || name != "":
		r.Kind = target.File
		r.Path = strings.ReplaceAll(name, `\012`, "\n")
	default:
		r.Kind = target.Private
	}
}

func hexField(b []byte, end byte) (v uint64, rest []byte, ok bool) {
	for i, c := range b {
		switch {
		case c >= '0' && c <= '9':
			v = v<<4 | uint64(c-'0')
		case c >= 'a' && c <= 'f':
			v = v<<4 | uint64(c-'a'+10)
		default:
			return v, b[i+1:], c == end && i > 0 && i <= 16
		}
	}
	return 0, nil, false
}
