package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// This file reads bolt's page format (version 2, as go.etcd.io/bbolt documents
// it in internal/common) once more and believes nothing: bolt itself trusts the
// pages it maps and may loop, fault or misread on a damaged one. Every page is
// looked at once, so the time is bounded by the size of the file.

const (
	pageHeader  = 16 // id u64, flags u16, count u16, overflow u32
	elementSize = 16 // of branch and leaf elements
	bucketSize  = 16 // root u64, sequence u64
	metaSize    = 64

	flagBranch, flagLeaf, flagFreelist = 0x01, 0x02, 0x10
	leafBucket                         = 0x01

	boltMagic   = 0xED0CDAED
	boltVersion = 2
	noFreelist  = ^uint64(0)
	bigCount    = 0xFFFF // the freelist's count is in its first entry

	minPage, maxPage = 1 << 10, 64 << 10 // bytes of a page
	maxDepth         = 32                // of a tree; at two keys a page more than any file holds
)

// bolt writes in the machine's own byte order.
var order = binary.NativeEndian

// pages is the check of one file.
type pages struct {
	r    io.ReaderAt
	size uint64 // of a page
	high uint64 // pages from here on do not belong to the file
	seen map[uint64]bool
	// entry, if not nil, is told of every entry; where it answers false, the
	// bucket that an entry is is not looked into.
	entry func(key, value []byte, bucket bool) bool
}

type boltMeta struct{ pageSize, root, freelist, high, txid uint64 }

// checkPages reads all pages that the file's newest state consists of. both
// tells whether its two heads are whole: if one is not, the state is the one
// of the other, and the last change may be missing.
func checkPages(r io.ReaderAt, fileSize int64) (both bool, err error) {
	m, both, err := newestMeta(r)
	if err != nil {
		return both, err
	}
	if err := m.fits(fileSize); err != nil {
		return both, err
	}
	c := &pages{r: r, size: m.pageSize, high: m.high, seen: map[uint64]bool{}}
	if err := c.tree(m.root, nil, nil, 0); err != nil {
		return both, err
	}
	return both, c.freelist(m.freelist)
}

// fits tells whether the file is as long as its head says.
func (m boltMeta) fits(fileSize int64) error {
	if m.high < 3 || m.high > uint64(fileSize)/m.pageSize {
		return fmt.Errorf("%d pages of %d bytes do not fit a file of %d bytes", m.high, m.pageSize, fileSize)
	}
	return nil
}

// newestMeta finds the state that bolt will use: of the two in the first two
// pages the later one that is whole.
func newestMeta(r io.ReaderAt) (m boltMeta, both bool, err error) {
	read := func(at int64) (m boltMeta, ok bool) {
		var b [metaSize]byte
		if _, err := r.ReadAt(b[:], at+pageHeader); err != nil {
			return m, false
		}
		h := fnv.New64a()
		h.Write(b[:metaSize-8])
		m = boltMeta{pageSize: uint64(order.Uint32(b[8:])), root: order.Uint64(b[16:]), freelist: order.Uint64(b[32:]),
			high: order.Uint64(b[40:]), txid: order.Uint64(b[48:])}
		return m, order.Uint32(b[:]) == boltMagic && order.Uint32(b[4:]) == boltVersion && order.Uint64(b[56:]) == h.Sum64() &&
			m.pageSize >= minPage && m.pageSize <= maxPage && m.pageSize&(m.pageSize-1) == 0
	}
	first, ok := read(0)
	if !ok { // the size of its pages is not known: the second lies at one of a few places
		for size := int64(minPage); size <= maxPage; size *= 2 {
			if m, ok := read(size); ok && m.pageSize == uint64(size) {
				return m, false, nil
			}
		}
		return first, false, errors.New("neither of its two heads is whole")
	}
	second, ok := read(int64(first.pageSize))
	ok = ok && second.pageSize == first.pageSize
	if ok && second.txid > first.txid {
		return second, true, nil
	}
	return first, ok, nil
}

// page reads a page with its overflow, once.
func (c *pages) page(id uint64) (flags, count uint16, b []byte, err error) {
	if id < 2 || id >= c.high {
		return 0, 0, nil, fmt.Errorf("page %d is outside the file's %d pages", id, c.high)
	}
	var h [pageHeader]byte
	if _, err := c.r.ReadAt(h[:], int64(id*c.size)); err != nil {
		return 0, 0, nil, fmt.Errorf("page %d cannot be read: %w", id, err)
	}
	more := uint64(order.Uint32(h[12:]))
	if order.Uint64(h[:]) != id || more >= c.high-id {
		return 0, 0, nil, fmt.Errorf("page %d says it is page %d and %d more", id, order.Uint64(h[:]), more)
	}
	for i := id; i <= id+more; i++ {
		if c.seen[i] {
			return 0, 0, nil, fmt.Errorf("page %d is used twice", i)
		}
		c.seen[i] = true
	}
	b = make([]byte, (more+1)*c.size)
	if _, err := c.r.ReadAt(b, int64(id*c.size)); err != nil {
		return 0, 0, nil, fmt.Errorf("page %d cannot be read: %w", id, err)
	}
	return order.Uint16(b[8:]), order.Uint16(b[10:]), b, nil
}

// tree checks a page and all below it. Its keys are at least low and below
// high; nil is no bound.
func (c *pages) tree(id uint64, low, high []byte, depth int) error {
	flags, count, b, err := c.page(id)
	if err != nil {
		return err
	}
	if depth > maxDepth {
		return fmt.Errorf("page %d lies %d levels deep", id, depth)
	}
	switch flags {
	case flagLeaf:
		return c.leaf(id, count, b, low, high, depth)
	case flagBranch:
		return c.branch(id, count, b, low, high, depth)
	}
	return fmt.Errorf("page %d is neither branch nor leaf (%#x)", id, flags)
}

// element returns n bytes that an element at offset at of b says lie pos bytes
// after itself, behind all elements.
func element(b []byte, count uint16, at int, pos, n uint32) ([]byte, bool) {
	start := uint64(at) + uint64(pos)
	if start < pageHeader+uint64(count)*elementSize || start+uint64(n) > uint64(len(b)) {
		return nil, false
	}
	return b[start : start+uint64(n)], true
}

func holds(b []byte, count uint16) bool { return pageHeader+int(count)*elementSize <= len(b) }

func (c *pages) branch(id uint64, count uint16, b, low, high []byte, depth int) error {
	if count == 0 || !holds(b, count) {
		return fmt.Errorf("page %d cannot hold %d branches", id, count)
	}
	key := func(i int) ([]byte, uint64, error) {
		at := pageHeader + i*elementSize
		k, ok := element(b, count, at, order.Uint32(b[at:]), order.Uint32(b[at+4:]))
		if !ok {
			return nil, 0, fmt.Errorf("page %d: key %d is outside the page", id, i)
		}
		return k, order.Uint64(b[at+8:]), nil
	}
	for i := range int(count) {
		k, child, err := key(i)
		if err != nil {
			return err
		}
		next := high
		if i+1 < int(count) {
			if next, _, err = key(i + 1); err != nil {
				return err
			}
		}
		// The first key of a branch may be lower than what its parent says: the parent keeps an old one.
		if i > 0 && outside(k, low, high) || i+1 < int(count) && bytes.Compare(k, next) >= 0 {
			return fmt.Errorf("page %d: key %d is out of order", id, i)
		}
		if i == 0 {
			k = low
		}
		if err := c.tree(child, k, next, depth+1); err != nil {
			return err
		}
	}
	return nil
}

func outside(k, low, high []byte) bool {
	return low != nil && bytes.Compare(k, low) < 0 || high != nil && bytes.Compare(k, high) >= 0
}

func (c *pages) leaf(id uint64, count uint16, b, low, high []byte, depth int) error {
	if !holds(b, count) {
		return fmt.Errorf("page %d cannot hold %d entries", id, count)
	}
	var last []byte
	for i := range int(count) {
		at := pageHeader + i*elementSize
		flags, pos := order.Uint32(b[at:]), order.Uint32(b[at+4:])
		ksize, vsize := order.Uint32(b[at+8:]), order.Uint32(b[at+12:])
		k, ok := element(b, count, at, pos, ksize)
		v, vok := element(b, count, at, pos+ksize, vsize)
		if !ok || !vok || pos+ksize < pos {
			return fmt.Errorf("page %d: entry %d is outside the page", id, i)
		}
		if outside(k, low, high) || i > 0 && bytes.Compare(k, last) <= 0 {
			return fmt.Errorf("page %d: entry %d is out of order", id, i)
		}
		last = k
		if c.entry != nil && !c.entry(k, v, flags == leafBucket) && flags == leafBucket {
			continue
		}
		switch flags {
		case 0:
		case leafBucket:
			if err := c.bucket(id, v, depth); err != nil {
				return err
			}
		default:
			return fmt.Errorf("page %d: entry %d has flags %#x", id, i, flags)
		}
	}
	return nil
}

// bucket checks a bucket: its root page, or the page it holds itself.
func (c *pages) bucket(id uint64, v []byte, depth int) error {
	if len(v) < bucketSize {
		return fmt.Errorf("page %d: a bucket of %d bytes", id, len(v))
	}
	if root := order.Uint64(v); root != 0 {
		return c.tree(root, nil, nil, depth+1)
	}
	inline := v[bucketSize:]
	if len(inline) < pageHeader || order.Uint16(inline[8:]) != flagLeaf {
		return fmt.Errorf("page %d: a bucket without a page", id)
	}
	if depth > maxDepth {
		return fmt.Errorf("page %d lies %d levels deep", id, depth)
	}
	return c.leaf(id, order.Uint16(inline[10:]), inline, nil, nil, depth+1)
}

// freelist checks the list of pages that bolt will write to next: none of them
// may be in use.
func (c *pages) freelist(id uint64) error {
	if id == noFreelist {
		return errors.New("it has no list of free pages")
	}
	flags, count, b, err := c.page(id)
	if err != nil {
		return err
	}
	ids, n := b[pageHeader:], uint64(count)
	if count == bigCount {
		ids, n = b[pageHeader+8:], order.Uint64(b[pageHeader:])
	}
	if flags != flagFreelist || n > uint64(len(ids))/8 {
		return fmt.Errorf("page %d holds no list of %d free pages", id, n)
	}
	last := uint64(1)
	for i := range n {
		free := order.Uint64(ids[i*8:])
		if free <= last || free >= c.high || c.seen[free] {
			return fmt.Errorf("page %d is called free", free)
		}
		last = free
	}
	return nil
}
