package patcher

import (
	"math"

	"hotpatchd/patcher/target"
)

const (
	// maxReach keeps every byte of image and annex within one signed 32-bit
	// distance of every other, with a page to spare.
	maxReach = math.MaxInt32 - 64<<10
	// heapRoom and stackRoom are left to what grows: brk upwards, stacks downwards
	// (the usual stack limit is 8 MiB, twice that for the guard gap and generosity).
	heapRoom  = 256 << 20
	stackRoom = 16 << 20
	// lowest usable address: below lies what null pointers hit.
	lowestAddr = 1 << 20
	// highestAddr is the end of the smaller user address space of the two
	// systems (47 bits), less a guard.
	highestAddr = 1<<47 - 1<<20
)

// gaps lists free places for size bytes near the image, nearest first: within
// reach of all of it, aligned, and apart from what may grow.
func gaps(regions []target.Region, base Loaded, size uint64) []target.Addr {
	type place struct {
		at       target.Addr
		distance uint64
	}
	var places []place
	add := func(low, high target.Addr) { // free: [low, high)
		low, high = alignUp(low, annexAlign), min(high, highestAddr)
		need := target.Addr(pages(size))
		if high < low || high-low < need {
			return
		}
		last := (high - need) &^ (annexAlign - 1)
		at := low // nearest end of the gap
		if high <= base.Base {
			at = last
		}
		if at < low {
			return
		}
		if !near(at, base) || !near(at+need, base) {
			return
		}
		d := uint64(at) - uint64(base.Base)
		if at < base.Base {
			d = uint64(base.Base) - uint64(at)
		}
		places = append(places, place{at, d})
	}
	prev := target.Addr(lowestAddr)
	for _, r := range regions {
		if r.Start > prev {
			high := r.Start - min(r.Start, annexAlign) // one granule stays free on either side
			if r.Kind == target.Stack {
				high = r.Start - min(r.Start, stackRoom)
			}
			add(prev, high)
		}
		after := r.End + annexAlign
		if r.Kind == target.Heap {
			after = r.End + heapRoom
		}
		prev = max(prev, after)
	}
	add(prev, highestAddr)
	sortBy(places, func(p place) uint64 { return p.distance })
	at := make([]target.Addr, len(places))
	for i, p := range places {
		at[i] = p.at
	}
	return at
}
