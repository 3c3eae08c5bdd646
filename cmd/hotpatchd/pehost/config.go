package pehost

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Bounds of what can be asked for: a demonstration, not a load test.
const (
	maxThreads = 256
	maxImage   = 64 << 20
)

// config is what the command line says.
type config struct {
	image    string // path, or "fd:N" for an open file that was handed down
	export   string
	argument uint64
	threads  int
	sleepers int
	header   string
	allow    []int64 // values that are right; empty: all
}

func parse(args []string, errOut io.Writer) (config, error) {
	var c config
	var allow string
	f := flag.NewFlagSet("pe-host", flag.ContinueOnError)
	f.SetOutput(errOut)
	f.StringVar(&c.image, "image", "", "PE file to host: a `path`, or fd:N for an open file that is handed down")
	f.StringVar(&c.export, "export", "answer", "`name` of the export that is called, an int f(int)")
	f.Uint64Var(&c.argument, "argument", 0, "what it is called with")
	f.IntVar(&c.threads, "threads", 2, "threads that call it without pause")
	f.IntVar(&c.sleepers, "sleepers", 0, "threads that sleep a millisecond between calls")
	f.StringVar(&c.header, "header", "file", "how the header is mapped: from the `file`, as Wine does, or anonymous")
	f.StringVar(&allow, "allow", "", "`values` that are right, as 42,43; any other is counted as wrong")
	if err := f.Parse(args); err != nil {
		return c, err
	}
	switch {
	case f.NArg() != 0:
		return c, fmt.Errorf("unexpected %q", f.Arg(0))
	case c.image == "":
		return c, errors.New("--image is missing")
	case c.header != "file" && c.header != "anonymous":
		return c, fmt.Errorf("unknown --header %q", c.header)
	case c.threads < 0 || c.sleepers < 0 || c.threads+c.sleepers < 1 || c.threads+c.sleepers > maxThreads:
		return c, fmt.Errorf("%d threads and %d sleepers: 1 to %d together", c.threads, c.sleepers, maxThreads)
	}
	for _, s := range strings.FieldsFunc(allow, func(r rune) bool { return r == ',' }) {
		v, err := strconv.ParseInt(s, 0, 32)
		if err != nil {
			return c, fmt.Errorf("--allow: %q is no 32-bit number", s)
		}
		c.allow = append(c.allow, v)
	}
	return c, nil
}
