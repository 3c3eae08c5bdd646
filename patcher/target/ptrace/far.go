//go:build linux && amd64

package ptrace

import (
	"bytes"
	"encoding/binary"
	"sort"
	"sync"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// device is major<<32 | minor of a file system, as maps and mountinfo show it.
type device uint64

func makeDevice(major, minor uint64) device { return device(major<<32 | minor&0xffffffff) }

// farSpan is memory of a process whose pages may have to be fetched from
// another machine, or from a program: whoever reads one that is not there waits
// until it comes, if ever.
type farSpan struct {
	target.Span
	path, fs string
	shared   bool
}

// localSystems have no block device of their own and still bring every page from
// this machine. All others without one (fuse, nfs, cifs, 9p, virtiofs, ceph, afs, and
// what we do not know) are far.
var localSystems = map[string]bool{
	"tmpfs": true, "ramfs": true, "rootfs": true, "devtmpfs": true, "hugetlbfs": true,
	"btrfs": true, "bcachefs": true, "zfs": true, "ubifs": true, overlay: true,
}

// overlay is local as far as what lies below it is. In a user namespace of his
// own anybody can lay one over a file system that he serves himself.
const overlay = "overlay"

// mountLimit bounds what is read of a list of mounts: some 30000 of them. Those
// beyond are not known, and so far.
const mountLimit = 4 << 20

// far tells of a file system whose pages do not come from a block device, nor
// from the kernel's own shared memory.
func (d device) far() bool { return d>>32 == 0 && !memoryDevices()[d] }

// onFar are those of some spans that lie on far file systems, by the type of each.
// It is looked up each time: a number may be given to another file system.
func (p *process) onFar(spans []farSpan, on []device) (far []farSpan, err error) {
	if len(spans) == 0 {
		return nil, nil
	}
	var known map[device]string
	var own bool
	dir, sub := p.dir, p.life.sub
	if late := p.within("read the mounts of", func() { known, own = mountsOf(dir, sub) }); late != nil {
		return nil, late
	}
	for i, f := range spans {
		fs, ok := known[on[i]]
		if !ok {
			fs = "a file system that is not mounted"
		} else if localSystems[fs] && (fs != overlay || own) {
			continue
		}
		f.fs = fs
		far = append(far, f)
	}
	return far, nil
}

// mountsOf tells by device what file systems a process sees, and whether its user
// namespace is ours. What it sees not, by chroot, we may see.
func mountsOf(dir procDir, sub string) (known map[device]string, own bool) {
	known = map[device]string{}
	for _, list := range []struct {
		dir  procDir
		name string
	}{{dir, sub + "mountinfo"}, {unix.AT_FDCWD, "/proc/self/mountinfo"}} {
		if b, err := list.dir.read(list.name, nil, mountLimit); err == nil {
			parseMounts(b, known)
		}
	}
	theirs, e1 := dir.link(sub + "ns/user")
	ours, e2 := procDir(unix.AT_FDCWD).link("/proc/self/ns/user")
	return known, e1 == nil && e2 == nil && theirs == ours
}

// parseMounts adds the types of file systems without a block device
// (proc_pid_mountinfo(5)). What is known already stays.
func parseMounts(b []byte, known map[device]string) {
	for len(b) > 0 {
		line, rest, whole := bytes.Cut(b, newline)
		b = rest
		mount, end, ok := bytes.Cut(line, []byte(" - "))
		fields := bytes.Fields(mount)
		if !ok || !whole || len(fields) < 3 {
			continue
		}
		major, minor, ok := bytes.Cut(fields[2], []byte(":"))
		fs, _, _ := bytes.Cut(end, []byte(" "))
		if !ok || string(major) != "0" || len(fs) == 0 {
			continue
		}
		var n uint64
		for _, c := range minor {
			n = n*10 + uint64(c-'0')
		}
		if _, ok := known[makeDevice(0, n)]; !ok {
			known[makeDevice(0, n)] = string(fs)
		}
	}
}

// memoryDevices are the file systems inside the kernel that hold shared memory
// (memfd_create, System V, MAP_SHARED without a file), with pages of each size.
var memoryDevices = sync.OnceValue(func() map[device]bool {
	const hugeShift = 26 // MFD_HUGE_SHIFT
	known := map[device]bool{}
	for _, flags := range []int{0, unix.MFD_HUGETLB, unix.MFD_HUGETLB | 21<<hugeShift, unix.MFD_HUGETLB | 30<<hugeShift} {
		fd, err := unix.MemfdCreate("hotpatchd", unix.MFD_CLOEXEC|flags)
		if err != nil {
			continue
		}
		var s unix.Stat_t
		if unix.Fstat(fd, &s) == nil {
			known[makeDevice(uint64(unix.Major(s.Dev)), uint64(unix.Minor(s.Dev)))] = true
		}
		unix.Close(fd)
	}
	return known
})

// reach tells how much of n bytes at at can be read or written without a page
// being fetched from far away, and if that is not all of it, why not. It is true
// for the moment: the pages may go, or others may be mapped there, right after.
func (p *process) reach(op string, at target.Addr, n int, write bool) (int, error) {
	end := at + target.Addr(n)
	for i := sort.Search(len(p.far), func(i int) bool { return p.far[i].End > at }); i < len(p.far) && p.far[i].Start < end; i++ {
		f := &p.far[i]
		first := max(at, f.Start)
		why := "is not in memory; to read it could take for ever"
		absent := first
		if write && f.shared {
			why = "is shared with it; to write it could take for ever"
		} else {
			var err error
			if absent, err = p.absent(target.Span{Start: first, End: min(end, f.End)}); err != nil {
				return int(first - at), err
			}
		}
		if absent < min(end, f.End) {
			return int(absent - at), p.refuse(op, absent, target.ErrUnsupported, "%s lies on %s and %s", f.path, f.fs, why)
		}
	}
	return n, nil
}

// absent is the first address in a span whose page would have to be fetched, its
// end if none is. A page that was written is in memory or in swap. The mark that
// userfaultfd leaves in place of a page looks as if it were in swap.
func (p *process) absent(s target.Span) (target.Addr, error) {
	at := s.End
	err := p.pagemap(s, func(page target.Addr, entry uint64) bool {
		if entry&pagePresent == 0 && entry&(pageSwapped|pageMarked) != pageSwapped {
			at = max(page, s.Start)
			return false
		}
		return true
	})
	return at, err
}

// pagemap reports the entry of each page of a span, until report says no.
func (p *process) pagemap(s target.Span, report func(page target.Addr, entry uint64) bool) error {
	for page, last := s.Start&^(target.PageSize-1), s.End; page < last; {
		n := min((uint64(last-page)+target.PageSize-1)/target.PageSize, pagemapChunk)
		var buf []byte
		var err error
		first := page
		if late := p.within("read the page map of", func() { buf, err = readPagemap(p.dir, p.life.sub, first, int(n)) }); late != nil {
			return late
		}
		if err != nil {
			return p.fail("read the page map of", page, err)
		}
		for ; len(buf) >= pagemapSize; buf = buf[pagemapSize:] {
			if !report(page, binary.LittleEndian.Uint64(buf)) {
				return nil
			}
			page += target.PageSize
		}
	}
	return nil
}

// readPagemap reads up to n entries, at least one.
func readPagemap(dir procDir, sub string, page target.Addr, n int) ([]byte, error) {
	fd, err := dir.open(sub+"pagemap", unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	buf := make([]byte, pagemapSize*n)
	got, err := retry(func() (int, error) { return unix.Pread(fd, buf, int64(page/target.PageSize)*pagemapSize) })
	if err == nil && got < pagemapSize {
		err = unix.ESRCH
	}
	return buf[:max(got, 0)], err
}
