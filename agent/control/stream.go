package control

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"time"
)

// Bounds on an upload.
const (
	MaxRelease      = 256 << 20 // bytes of a release
	MaxMetadata     = 8 << 20   // bytes of one metadata file
	MaxMetadataSum  = 32 << 20  // bytes of all of them
	MaxMetadataName = 128       // bytes of a file's name
	maxMetadata     = 1024      // files: a folder keeps every version of every role
	maxUpload       = MaxRelease + MaxMetadataSum + 1<<20
)

// Names of the parts of an upload.
const (
	partRelease  = "release"
	partMetadata = "metadata"
)

// lines writes newline-delimited events. After the first line that the peer
// does not take nothing more is tried: the work goes on without a listener.
type lines struct {
	c       *call
	started bool
	broken  bool
}

func (l *lines) send(e Event) {
	if l.broken {
		return
	}
	doc := filter(l.c.caller, &e)
	if doc == nil {
		return
	}
	if e.Time.IsZero() {
		e.Time = At(l.c.cfg.Now())
	}
	b, err := encode(doc, l.c.cfg.Version, l.c.cfg.Now())
	if err != nil {
		l.c.report(l.c.caller, err)
		l.broken = true
		return
	}
	l.begin()
	rc := http.NewResponseController(l.c.w)
	rc.SetWriteDeadline(time.Now().Add(l.c.writeWait))
	if _, err := l.c.w.Write(b); err != nil {
		l.broken = true
	} else if err := rc.Flush(); err != nil {
		l.broken = true
	}
}

func (l *lines) begin() {
	if !l.started {
		l.started, l.c.wrote = true, true
		h := l.c.w.Header()
		h.Set("Content-Type", "application/x-ndjson")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		l.c.w.WriteHeader(200)
	}
}

// change runs a change and streams its progress; the last line is the outcome.
// What fails before the first line is an ordinary error with its status.
func (c *call) change(run func(progress func(Event)) (*Change, error)) {
	http.NewResponseController(c.w).SetReadDeadline(time.Time{})
	l := &lines{c: c}
	ch, err := run(l.send)
	switch {
	case err != nil && !l.started:
		c.fail(err)
	case err != nil:
		e := asError(err)
		if e.Code == CodeInternal {
			c.report(c.caller, err)
		}
		l.send(Event{Type: EventError, Text: e.Text, Error: c.errorFor(e)})
	default:
		doc := *ch // the service's value stays as it is
		doc.Header = Header{Format: FormatChange, Generated: At(c.cfg.Now()), Version: c.cfg.Version}
		l.send(Event{Type: EventResult, Text: ch.Text, Release: ch.Release, State: string(ch.State), Change: &doc})
	}
}

func (c *call) rollback() {
	var r RollbackRequest
	if err := c.readJSON(&r); err != nil {
		c.fail(err)
		return
	}
	if r.ID != "" {
		if err := checkID(r.ID); err != nil {
			c.fail(err)
			return
		}
	}
	c.change(func(progress func(Event)) (*Change, error) {
		return c.cfg.Service.Rollback(c.ctx, c.caller, r, progress)
	})
}

func (c *call) install() {
	r, done, err := c.installRequest()
	if err != nil {
		c.fail(err)
		return
	}
	defer done()
	c.change(func(progress func(Event)) (*Change, error) {
		return c.cfg.Service.Install(c.ctx, c.caller, *r, progress)
	})
}

// installRequest reads an id, or a release with the metadata that lay beside
// it. done must be called when its memory is not needed any more.
func (c *call) installRequest() (r *InstallRequest, done func(), err error) {
	r = &InstallRequest{}
	kind, params, _ := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if kind != "multipart/form-data" {
		if err := c.readJSON(r); err != nil {
			return nil, nil, err
		}
		if r.ID != "" {
			err = checkID(r.ID)
		}
		return r, func() {}, err
	}
	select {
	case c.upload <- struct{}{}:
	default:
		return nil, nil, &Error{Code: CodeConflict, Text: "another release is being sent", Hint: "try again when it is done"}
	}
	done = func() { <-c.upload }
	http.NewResponseController(c.w).SetReadDeadline(time.Now().Add(uploadWait))
	body := http.MaxBytesReader(c.w, c.r.Body, maxUpload)
	if err := readUpload(multipart.NewReader(body, params["boundary"]), c.r.ContentLength, r); err != nil {
		done()
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			err = Errorf(CodeTooLarge, "the upload has more than %d bytes", int64(maxUpload))
		}
		return nil, nil, err
	}
	return r, done, nil
}

func readUpload(m *multipart.Reader, length int64, r *InstallRequest) error {
	sum := int64(0)
	for {
		p, err := m.NextRawPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return uploadError(err)
		}
		switch name := p.FormName(); name {
		case partRelease:
			if r.File != nil {
				return Errorf(CodeUsage, "the upload holds two releases")
			}
			if r.File, err = readPart(p, MaxRelease, length); err != nil {
				return err
			}
		case partMetadata:
			// Part.FileName would cut a path down to its last element; here it is refused.
			_, params, err := mime.ParseMediaType(p.Header.Get("Content-Disposition"))
			file := params["filename"]
			if err != nil || !plainName(file) {
				return Errorf(CodeUsage, "%q is no name of a metadata file", clip(file))
			}
			if _, twice := r.Metadata[file]; twice || len(r.Metadata) >= maxMetadata {
				return Errorf(CodeUsage, "the upload holds too many metadata files, or %s twice", file)
			}
			b, err := readPart(p, MaxMetadata, 0)
			if err != nil {
				return err
			}
			if sum += int64(len(b)); sum > MaxMetadataSum {
				return Errorf(CodeTooLarge, "the metadata has more than %d bytes", MaxMetadataSum)
			}
			if r.Metadata == nil {
				r.Metadata = map[string][]byte{}
			}
			r.Metadata[file] = b
		default:
			return Errorf(CodeUsage, "the upload holds a part %q", clip(name))
		}
	}
	if len(r.File) == 0 {
		return Errorf(CodeUsage, "the upload holds no release")
	}
	return nil
}

// readPart reads at most limit bytes. expect is how much to make room for, so
// that a large release does not lie in memory several times.
func readPart(p *multipart.Part, limit, expect int64) ([]byte, error) {
	var buf bytes.Buffer
	if expect > 0 && expect <= maxUpload {
		buf.Grow(int(min(expect, limit)))
	}
	n, err := buf.ReadFrom(io.LimitReader(p, limit+1))
	if err != nil {
		return nil, uploadError(err)
	}
	if n > limit {
		return nil, Errorf(CodeTooLarge, "a part of the upload has more than %d bytes", limit)
	}
	return buf.Bytes(), nil
}

func uploadError(err error) error {
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		return err
	}
	return Errorf(CodeUsage, "the upload cannot be read: %s", clip(err.Error()))
}

// plainName tells whether a file name is a name and nothing else: letters,
// digits, dot, dash, underscore, not beginning with a dot.
func plainName(s string) bool {
	if s == "" || len(s) > MaxMetadataName || s[0] == '.' {
		return false
	}
	for i := 0; i < len(s); i++ {
		b := s[i]
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '.' || b == '_' || b == '-') {
			return false
		}
	}
	return true
}

// events streams what happens until the peer goes, does not keep up, or the
// server stops.
func (c *call) events() {
	http.NewResponseController(c.w).SetReadDeadline(time.Time{})
	ch, err := c.cfg.Service.Subscribe(c.ctx, c.caller)
	if err != nil {
		c.fail(err)
		return
	}
	l := &lines{c: c}
	l.begin()
	if err := http.NewResponseController(c.w).Flush(); err != nil { // the peer knows now that it hears all
		return
	}
	for !l.broken {
		select {
		case e, ok := <-ch:
			if !ok {
				return
			}
			l.send(e)
		case <-c.ctx.Done():
			return
		case <-c.quit:
			return
		}
	}
}

func (c *call) metrics() {
	b, err := c.cfg.Service.Metrics(c.ctx)
	if err != nil {
		c.fail(err)
		return
	}
	if !c.caller.Admin {
		b = publicMetrics(b)
	}
	c.write(200, "text/plain; version=0.0.4; charset=utf-8", b)
}

func (c *call) diagnose() {
	b, err := c.cfg.Service.Diagnose(c.ctx, c.caller)
	if err != nil {
		c.fail(err)
		return
	}
	c.write(200, "application/zip", b)
}
