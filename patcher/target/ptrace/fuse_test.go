//go:build linux && amd64

package ptrace

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target/ptrace/hosttest"
)

// fuseEnv makes the test binary the server of a file system with one file:
// FOLDER:GOOD:FAIL. The first GOOD pages read as the letter a. Of each other page
// the first FAIL reads end with an error, and those after that never.
const fuseEnv = "HOTPATCHD_TEST_FUSE"

// farSize is the size of that file.
const farSize = 16 * page

// farFile is the file of such a file system. It is there until the server is
// killed, which ends every wait for it.
func farFile(t *testing.T, good, fail int) (path string, kill func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		hosttest.Need(t, "root, to mount a file system")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		hosttest.Need(t, "/dev/fuse")
	}
	dir := t.TempDir()
	must(t, "chmod", os.Chmod(dir, 0o755))
	c := exec.Command(os.Args[0])
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%s:%d:%d", fuseEnv, dir, good, fail))
	out, err := c.StdoutPipe()
	must(t, "pipe", err)
	must(t, "start", c.Start())
	over := false
	kill = func() {
		if !over {
			over = true
			c.Process.Kill()
			c.Wait()
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	}
	t.Cleanup(kill)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "mounted\n" {
		hosttest.Need(t, "the right to mount a FUSE file system: %q, %v", strings.TrimSpace(line), err)
	}
	return filepath.Join(dir, "f"), kill
}

// serveFuse answers as include/uapi/linux/fuse.h has it.
func serveFuse(job string) {
	words := strings.Split(job, ":")
	dir := words[0]
	good, _ := strconv.Atoi(words[1])
	fail, _ := strconv.Atoi(words[2])
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Mount("hotpatchd-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd))
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("mounted")
	le := binary.LittleEndian
	attr := func(node uint64) []byte {
		a := make([]byte, 88)
		le.PutUint64(a, node)
		mode, size := uint32(0o40755), uint64(0)
		if node != 1 {
			mode, size = 0o100755, farSize
		}
		le.PutUint64(a[8:], size)
		le.PutUint64(a[16:], size/512)
		le.PutUint32(a[60:], mode)
		le.PutUint32(a[64:], 1)
		le.PutUint32(a[80:], 4096)
		return a
	}
	failed := map[uint64]int{}
	buf := make([]byte, 1<<20)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.ENODEV {
			os.Exit(0)
		}
		if err != nil || n < 40 {
			continue
		}
		op, unique, node, body := le.Uint32(buf[4:]), le.Uint64(buf[8:]), le.Uint64(buf[16:]), buf[40:n]
		reply := func(errno int32, parts ...[]byte) {
			b := make([]byte, 16)
			for _, p := range parts {
				b = append(b, p...)
			}
			le.PutUint32(b, uint32(len(b)))
			le.PutUint32(b[4:], uint32(errno))
			le.PutUint64(b[8:], unique)
			unix.Write(fd, b)
		}
		switch op {
		case 26: // INIT
			b := make([]byte, 64)
			le.PutUint32(b, 7)
			le.PutUint32(b[4:], 31)
			le.PutUint32(b[20:], 4096) // max_write; no read ahead
			le.PutUint32(b[24:], 1)
			reply(0, b)
		case 1: // LOOKUP
			if string(body) != "f\x00" {
				reply(-int32(unix.ENOENT))
				break
			}
			b := make([]byte, 40)
			le.PutUint64(b, 2)
			le.PutUint64(b[16:], 3600)
			le.PutUint64(b[24:], 3600)
			reply(0, b, attr(2))
		case 3: // GETATTR
			b := make([]byte, 16)
			le.PutUint64(b, 3600)
			reply(0, b, attr(node))
		case 14: // OPEN
			reply(0, make([]byte, 16))
		case 15: // READ
			offset, size := le.Uint64(body[8:]), le.Uint32(body[16:])
			switch {
			case offset < uint64(good)*page:
				reply(0, []byte(strings.Repeat("a", int(size))))
			case failed[offset] < fail:
				failed[offset]++
				reply(-int32(unix.EIO))
			}
		case 18, 25: // RELEASE, FLUSH
			reply(0)
		case 2, 36, 42: // FORGET, INTERRUPT, BATCH_FORGET
		default:
			reply(-int32(unix.ENOSYS))
		}
	}
}
