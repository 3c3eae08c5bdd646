package patcher

import (
	"cmp"
	"slices"

	"hotpatchd/patcher/target"
)

// maxPlacesRun bounds one read of places that lie together, bytes.
const maxPlacesRun = 64 << 10

// readPlaces reads what stands at each of the writes, in their order. Places on
// the same page, or on pages side by side, are read in one call, with what lies
// between them: under a freeze each call counts. An error is an *unreadable that
// names the place.
func readPlaces(p target.Process, writes []write) ([][]byte, error) {
	order := make([]int, len(writes))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(writes[a].at, writes[b].at) })
	have := make([][]byte, len(writes))
	for len(order) > 0 {
		start, end, n := together(writes, order)
		all, failed := read(p, start, int(end-start))
		for _, i := range order[:n] {
			w := writes[i]
			if failed == nil {
				have[i] = all[w.at-start : w.end()-start]
				continue
			}
			var err error
			if have[i], err = read(p, w.at, len(w.from)); err != nil { // which of them is it?
				return nil, &unreadable{w.at, w.name, err}
			}
		}
		order = order[n:]
	}
	return have, nil
}

// together is the run of memory that holds the first n of some writes in
// ascending order: every page of it holds one, so that all of it is mapped if they are.
func together(writes []write, order []int) (start, end target.Addr, n int) {
	first := writes[order[0]]
	start, end, n = first.at, first.end(), 1
	for _, i := range order[1:] {
		w := writes[i]
		if w.at/target.PageSize > (end-1)/target.PageSize+1 || w.end()-start > maxPlacesRun {
			break
		}
		end = max(end, w.end())
		n++
	}
	return start, end, n
}

func (w write) end() target.Addr { return w.at + target.Addr(len(w.from)) }
