package repository

import (
	"context"
	"io"
	"os"
	"sync/atomic"
)

// A folder may be a share whose server has gone, or a stick that is failing:
// then a system call does not come back, and nothing can take it back. It is
// made beside, so that whoever waits can stop waiting. Once this many have been
// left so, the folder is not tried again until one of them returns.
const maxHanging = 2

// chunk is what one read of a file gave.
type chunk struct {
	b   []byte
	err error
}

// chunkSize is read at once, in bytes.
const chunkSize = 128 << 10

// fileReader reads a file that another goroutine reads for it.
type fileReader struct {
	ctx    context.Context
	chunks chan chunk
	closed chan struct{}
	rest   []byte
	err    error

	hanging *atomic.Int32 // counts those that were left, of all readers of one folder
	state   atomic.Int32  // of the goroutine: it works, was left, or has ended
}

const (
	works = iota
	left
	over
)

// leave gives up waiting.
func (r *fileReader) leave() error {
	if r.state.CompareAndSwap(works, left) {
		r.hanging.Add(1)
	}
	return context.Cause(r.ctx)
}

func (r *fileReader) end() {
	if !r.state.CompareAndSwap(works, over) {
		r.hanging.Add(-1)
	}
}

// opened is the outcome of opening a file.
type opened struct {
	size int64
	err  error
}

// openBeside opens path for reading from offset on. Its waits end with ctx.
func openBeside(ctx context.Context, path string, offset int64, hanging *atomic.Int32, open func(string) (*os.File, os.FileInfo, error)) (io.ReadCloser, int64, error) {
	if hanging.Load() >= maxHanging {
		return nil, 0, fail(CodeTooSlow, nil, "%s does not answer, and has not for some time", path).hint("look at the share or the stick; %s", hintItself)
	}
	r := &fileReader{ctx: ctx, chunks: make(chan chunk), closed: make(chan struct{}), hanging: hanging}
	began := make(chan opened, 1)
	go func() {
		defer r.end()
		f, info, err := open(path)
		if err != nil {
			began <- opened{0, err}
			return
		}
		defer f.Close()
		if offset > 0 {
			if _, err := f.Seek(offset, io.SeekStart); err != nil {
				began <- opened{0, err}
				return
			}
		}
		began <- opened{info.Size(), nil}
		r.feed(f)
	}()
	select {
	case o := <-began:
		return r, o.size, o.err
	case <-ctx.Done():
		defer r.Close()
		return nil, 0, r.leave()
	}
}

// feed reads until the end, an error, or until nobody wants more.
func (r *fileReader) feed(f io.Reader) {
	for {
		b := make([]byte, chunkSize)
		n, err := f.Read(b)
		select {
		case r.chunks <- chunk{b[:n], err}:
		case <-r.closed:
			return
		}
		if err != nil {
			return
		}
	}
}

func (r *fileReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		select {
		case c := <-r.chunks:
			r.rest, r.err = c.b, c.err
		case <-r.ctx.Done():
			return 0, r.leave()
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *fileReader) Close() error {
	close(r.closed)
	return nil
}
