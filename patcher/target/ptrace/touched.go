//go:build linux && amd64

package ptrace

import "hotpatchd/patcher/target"

// Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61 // or of shared memory
	pageMarked  = 1 << 57 // write-protected by userfaultfd
	pagemapSize = 8       // bytes of an entry
	// pagemapChunk is how many entries are read in one go.
	pagemapChunk = 8192
)

// Touched reads which pages of a span exist. Only anonymous memory may be asked
// for: a page of a file that is not present is not zero.
func (p *process) Touched(s target.Span) ([]target.Span, error) {
	var runs []target.Span
	err := p.pagemap(s, func(page target.Addr, entry uint64) bool {
		if entry&(pagePresent|pageSwapped) == 0 {
			return true
		}
		at, end := max(page, s.Start), min(page+target.PageSize, s.End)
		if k := len(runs); k > 0 && runs[k-1].End == at {
			runs[k-1].End = end
		} else {
			runs = append(runs, target.Span{Start: at, End: end})
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	return runs, nil
}
