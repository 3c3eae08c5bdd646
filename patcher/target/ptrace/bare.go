//go:build linux && amd64

package ptrace

import (
	"bytes"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// maxELFs bounds the files that code comes from in a process that is called
// bare: most have less than ten.
const maxELFs = 64

// elfOnly tells that all executable memory of a process is of files that are ELF
// files, by the first bytes that it has mapped of them: whatever else there is
// in its memory, it is no code of a PE image. Most processes of a machine are
// like that, and need not be opened. Whatever is unclear makes it false.
func (b *backend) elfOnly(folder string, maps []byte) bool {
	var starts [maxELFs]struct {
		inode
		at target.Addr
	}
	var code [maxELFs]inode
	var n, coded int
	for rest := maps; len(rest) > 0; {
		line, next, _ := bytes.Cut(rest, newline)
		rest = next
		at, line, ok1 := hexField(line, '-')
		_, line, ok2 := hexField(line, ' ')
		if !ok1 || !ok2 || len(line) < 5 {
			return false
		}
		exec, read := line[2] == 'x', line[0] == 'r'
		offset, line, ok1 := hexField(line[5:], ' ')
		major, line, ok2 := hexField(line, ':')
		minor, line, ok3 := hexField(line, ' ')
		if !ok1 || !ok2 || !ok3 {
			return false
		}
		f := inode{dev: makeDevice(major, minor)}
		for len(line) > 0 && line[0] >= '0' && line[0] <= '9' {
			f.ino = f.ino*10 + uint64(line[0]-'0')
			line = line[1:]
		}
		switch name := bytes.TrimLeft(line, " "); {
		case f.ino == 0:
			if exec && !bytes.HasPrefix(name, special) {
				return false // code without a file
			}
			continue
		case offset == 0 && read && n < len(starts):
			starts[n].inode, starts[n].at = f, target.Addr(at)
			n++
		}
		if !exec || coded > 0 && code[coded-1] == f {
			continue
		}
		if f.dev.far() || coded == len(code) {
			return false
		}
		code[coded] = f
		coded++
	}
	if coded == 0 {
		return false // nothing runs without code: not all could be seen
	}
	mem, err := b.proc.open(folder+"/mem", unix.O_RDONLY)
	if err != nil {
		return false
	}
	defer unix.Close(mem)
	for _, f := range code[:coded] {
		found := false
		for _, s := range starts[:n] {
			if s.inode != f {
				continue
			}
			var magic [4]byte
			if k, err := unix.Pread(mem, magic[:], int64(s.at)); err != nil || k != len(magic) || magic != elfMagic {
				return false // each place where it is mapped: a page may have been written to
			}
			found = true
		}
		if !found {
			return false
		}
	}
	b.elfs.add(code[:coded]...)
	return true
}

// elfMagic begins an ELF file (elf(5)); a PE file begins with MZ.
var elfMagic = [4]byte{0x7f, 'E', 'L', 'F'}

// special begins the names of the kernel's own [vdso] and [vsyscall], and no
// name that a program can give to its memory: that is [anon:…].
var special = []byte("[v")
