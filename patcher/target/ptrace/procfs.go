//go:build linux && amd64

package ptrace

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// procDir is one directory of /proc, held open: a process that took over the
// pid of a dead one is never reached through it. Names are relative to it.
type procDir int

func openDir(at procDir, name string) (procDir, error) {
	fd, err := retry(func() (int, error) {
		return unix.Openat(int(at), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	})
	return procDir(fd), err
}

func (d procDir) close() { unix.Close(int(d)) }

func (d procDir) open(name string, flags int) (int, error) {
	return retry(func() (int, error) { return unix.Openat(int(d), name, flags|unix.O_CLOEXEC, 0) })
}

// read returns the file's contents in buf, which grows up to limit; what is
// beyond limit is left out.
func (d procDir) read(name string, buf []byte, limit int) ([]byte, error) {
	fd, err := d.open(name, unix.O_RDONLY)
	if err != nil {
		return buf[:0], err
	}
	defer unix.Close(fd)
	return readAll(fd, buf, limit)
}

func readAll(fd int, buf []byte, limit int) ([]byte, error) {
	n := 0
	for {
		if n == cap(buf) {
			bigger := make([]byte, max(2*cap(buf), 4096))
			copy(bigger, buf[:n])
			buf = bigger
		}
		buf = buf[:cap(buf)]
		k, err := retry(func() (int, error) { return unix.Read(fd, buf[n:]) })
		if err != nil {
			return buf[:0], err
		}
		n += k
		if k == 0 || n >= limit {
			return buf[:min(n, limit)], nil
		}
	}
}

func (d procDir) link(name string) (string, error) {
	var buf [4096]byte
	n, err := unix.Readlinkat(int(d), name, buf[:])
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// stat reads the stat file below sub ("" or "task/TID/") without allocating.
func (d procDir) stat(sub string, s *stat) error {
	fd, err := d.open(sub+"stat", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var buf [1024]byte
	n, err := retry(func() (int, error) { return unix.Read(fd, buf[:]) })
	if err != nil {
		return err
	}
	if !parseStat(buf[:n], s) {
		return unix.ESRCH // nothing to read: it ended between open and read
	}
	return nil
}

// numbers appends the numeric names of a directory to dst: processes of /proc,
// threads of a task folder. buf is scratch; a large one makes it one system
// call, which is what keeps a pass from skipping entries while others end.
func (d procDir) numbers(dst []int, buf []byte) ([]int, error) {
	if _, err := unix.Seek(int(d), 0, 0); err != nil {
		return dst, err
	}
	for {
		n, _, e := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(d), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		if e != 0 {
			return dst, e
		}
		if n == 0 {
			return dst, nil
		}
		for b := buf[:n]; len(b) > 19; { // struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name
			length := int(b[16]) | int(b[17])<<8
			if length < 20 || length > len(b) {
				return dst, unix.EIO
			}
			if id, ok := number(b[19:length]); ok {
				dst = append(dst, id)
			}
			b = b[length:]
		}
	}
}

func number(name []byte) (n int, ok bool) {
	for i, c := range name {
		if c == 0 {
			return n, i > 0
		}
		if c < '0' || c > '9' || i > 9 {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return 0, false
}

func taskPath(tid int) string { return "task/" + strconv.Itoa(tid) + "/" }

// retry repeats a call that a signal to ourselves interrupted.
func retry(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); err != unix.EINTR {
			return n, err
		}
	}
}

// openat opens a name that ends in a zero byte, for reading.
func openat(at procDir, name []byte) (int, unix.Errno) {
	fd, _, e := unix.Syscall6(unix.SYS_OPENAT, uintptr(at), uintptr(unsafe.Pointer(&name[0])), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0)
	return int(fd), e
}
