//go:build linux && amd64

package ptrace

import (
	"bytes"
	"os"
	"path"
	"strings"
)

// cgroupRoot is where the unified control group hierarchy is mounted, "" if it
// is not (proc_pid_mountinfo(5): fields up to " - ", then the type).
func cgroupRoot() string {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	for _, line := range strings.Split(string(b), "\n") {
		mount, rest, ok := strings.Cut(line, " - ")
		if fields := strings.Fields(mount); ok && strings.HasPrefix(rest, "cgroup2 ") && len(fields) > 4 && fields[3] == "/" {
			return fields[4]
		}
	}
	return ""
}

// maxGroupDepth bounds the walk from a control group to the root.
const maxGroupDepth = 64

// frozenGroup is the control group of the process, or one above it, that is
// frozen; "" if none is. A thread of it can be stopped by us, but would make no
// call before the group is thawed.
func (p *process) frozenGroup() string {
	if p.b.cgroups == "" {
		return ""
	}
	b, err := p.dir.read(p.life.sub+"cgroup", nil, cgroupLimit)
	if err != nil {
		return ""
	}
	for _, line := range strings.Split(string(b), "\n") {
		group, unified := strings.CutPrefix(line, "0::")
		if !unified || strings.Contains(group, "..") {
			continue // of another namespace
		}
		for n := 0; n < maxGroupDepth && len(group) > 1; n++ {
			state, err := os.ReadFile(path.Join(p.b.cgroups, group, "cgroup.freeze"))
			if err == nil && bytes.HasPrefix(state, []byte("1")) {
				return group
			}
			group = path.Dir(group)
		}
	}
	return ""
}
