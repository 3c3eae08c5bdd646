//go:build linux && amd64

package ptrace

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"hotpatchd/patcher/target"
)

// Bits of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pagemapSize = 8 // bytes of an entry
	// pagemapChunk is how many entries are read in one go.
	pagemapChunk = 8192
)

// Touched reads which pages of a span exist. Only anonymous memory may be asked
// for: a page of a file that is not present is not zero.
func (p *process) Touched(s target.Span) ([]target.Span, error) {
	fd, err := p.dir.open(p.life.sub+"pagemap", unix.O_RDONLY)
	if err != nil {
		return nil, p.fail("read the page map of", s.Start, err)
	}
	defer unix.Close(fd)
	var runs []target.Span
	buf := make([]byte, pagemapSize*pagemapChunk)
	first, last := s.Start/target.PageSize, (s.End+target.PageSize-1)/target.PageSize
	for page := first; page < last; {
		n := min(uint64(last-page), pagemapChunk)
		got, err := retry(func() (int, error) { return unix.Pread(fd, buf[:n*pagemapSize], int64(page)*pagemapSize) })
		if err != nil || got < pagemapSize {
			return nil, p.fail("read the page map of", page*target.PageSize, target.ErrGone)
		}
		for i := 0; i+pagemapSize <= got; i += pagemapSize {
			if binary.LittleEndian.Uint64(buf[i:])&(pagePresent|pageSwapped) != 0 {
				at := max(page*target.PageSize, s.Start)
				end := min((page+1)*target.PageSize, s.End)
				if k := len(runs); k > 0 && runs[k-1].End == at {
					runs[k-1].End = end
				} else {
					runs = append(runs, target.Span{Start: at, End: end})
				}
			}
			page++
		}
	}
	return runs, nil
}
