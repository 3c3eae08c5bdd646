package agent

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

var _ control.Service = (*Agent)(nil)

// Status, Eligibility and Offers read the published snapshot.
func (a *Agent) Status(context.Context, control.Caller) (*control.Status, error) {
	shown := a.shown.Load()
	s := a.asOfNow(shown.status)
	s.Next = next(shown.announced, shown.offers, a.o.Now())
	s.Story = a.storyNow(shown)
	return &s, nil
}

func (a *Agent) Eligibility(context.Context, control.Caller) (*control.Eligibility, error) {
	s := a.shown.Load().eligibility
	return &s, nil
}

func (a *Agent) Offers(context.Context, control.Caller) (*control.Offers, error) {
	s := a.shown.Load().offers
	return &s, nil
}

// Processes reads the published snapshot and narrows it.
func (a *Agent) Processes(_ context.Context, _ control.Caller, q control.ProcessQuery) (*control.Processes, error) {
	s := a.shown.Load().processes
	all := s.Processes
	s.Processes = []control.Process{}
	for _, p := range all {
		if q.PID != 0 && p.PID != q.PID {
			continue
		}
		if q.Vulnerable {
			p.Images = slices.DeleteFunc(slices.Clone(p.Images), func(im control.Image) bool { return !im.State.Open() })
			if len(p.Images) == 0 {
				continue
			}
		}
		s.Processes = append(s.Processes, p)
	}
	return &s, nil
}

// Check refreshes the repository now.
func (a *Agent) Check(ctx context.Context, c control.Caller) (*control.Status, error) {
	checked := a.refresh(ctx)
	// After a failure too: who asks for the status next must see it there.
	err := a.call(ctx, func() { a.dirty = true; a.pass(a.runCtx(), "", nil) })
	var re *repository.Error
	switch {
	case errors.As(checked, &re):
		return nil, &control.Error{Code: control.CodeConflict, Text: "repository: " + re.Text, Hint: re.Hint}
	case checked != nil:
		return nil, checked
	case err != nil:
		return nil, err
	}
	return a.Status(ctx, c)
}

// runCtx is for work that a caller began: the caller may go, the work is
// bounded by itself.
func (a *Agent) runCtx() context.Context { return context.Background() }

// Verify reads every site again from memory and compares it with the records.
func (a *Agent) Verify(ctx context.Context, c control.Caller) (*control.Verify, error) {
	doc := &control.Verify{OK: true, Mismatches: []control.Mismatch{}, Unread: []control.Mismatch{}}
	err := a.call(ctx, func() {
		lives := map[target.ID]bool{}
		for _, r := range a.allRecords() {
			if !r.Live() {
				continue
			}
			exe := ""
			if p := a.procs[r.ID]; p != nil {
				exe = programOf(p.info)
			}
			bad, err := a.verifyOne(ctx, r)
			if errors.Is(err, target.ErrGone) {
				continue
			}
			lives[r.ID] = true
			doc.Images++
			doc.Sites += len(r.Sites)
			m := control.Mismatch{PID: r.ID.PID, Start: r.ID.Start, Exe: exe, Image: r.Image}
			if err != nil {
				m.Text = err.Error()
				doc.Unread = append(doc.Unread, m)
			}
			for _, x := range bad {
				m.Function, m.Address, m.RVA = x.Function, control.Addr(x.At), control.Addr(x.At-r.Base)
				m.Expected, m.Found = hex.EncodeToString(x.Want), hex.EncodeToString(x.Have)
				doc.Mismatches = append(doc.Mismatches, m)
			}
		}
		doc.Processes = len(lives)
		a.store.View(func(tx *store.Tx) error {
			if err := tx.VerifyHistory(); err != nil {
				doc.History = err.Error()
			}
			return nil
		})
	})
	doc.OK = len(doc.Mismatches) == 0 && len(doc.Unread) == 0 && doc.History == ""
	return doc, err
}

func (a *Agent) verifyOne(ctx context.Context, r patcher.Record) ([]patcher.Mismatch, error) {
	return aside(ctx, a, target.Info{ID: r.ID, Image: r.Image}, "verifying", openTimeout, func(ctx context.Context) ([]patcher.Mismatch, error) {
		p, err := a.o.Backend.Open(ctx, r.ID)
		if err != nil {
			return nil, err
		}
		defer p.Close()
		return patcher.Verify(p, r)
	})
}

// History returns what was done, newest first.
func (a *Agent) History(_ context.Context, _ control.Caller, limit int) (*control.History, error) {
	doc := &control.History{Entries: []control.HistoryEntry{}}
	err := a.store.View(func(tx *store.Tx) error {
		e, err := tx.History(limit)
		if err != nil {
			return err
		}
		doc.Entries = append(doc.Entries, e...)
		if err := tx.VerifyHistory(); err != nil {
			doc.Broken = err.Error()
		}
		return nil
	})
	return doc, err
}

// Explain tells what lies at an address: so that a crash can be told from a fix.
func (a *Agent) Explain(ctx context.Context, _ control.Caller, pid int, address uint64) (*control.Explain, error) {
	doc := &control.Explain{PID: pid, Address: control.Addr(address), Kind: "elsewhere", Text: "nothing of ours lies there"}
	found := false
	err := a.call(ctx, func() {
		for id, p := range a.procs {
			if id.PID != pid {
				continue
			}
			found = true
			doc.Start, doc.Exe = id.Start, programOf(p.info)
			for _, im := range p.images {
				end := im.Base + target.Addr(im.Identity.SizeOfImage)
				if at := target.Addr(address); at >= im.Base && at < end {
					doc.Kind, doc.Image, doc.Offset = "image", im.Name, uint64(at-im.Base)
					doc.Text = fmt.Sprintf("in %s, 0x%x bytes from its base", im.Name, doc.Offset)
				}
			}
		}
		for _, r := range a.allRecords() {
			if r.ID.PID == pid {
				explain(doc, r, target.Addr(address))
			}
		}
	})
	if err == nil && !found {
		err = &control.Error{Code: control.CodeNotFound, Text: fmt.Sprintf("no process %d", pid)}
	}
	return doc, err
}

func explain(doc *control.Explain, r patcher.Record, at target.Addr) {
	set := func(kind, function string, offset target.Addr, text string) {
		doc.Kind, doc.Function, doc.Offset, doc.Image, doc.Release = kind, function, uint64(offset), r.Image, r.Release
		doc.Text = text
	}
	if at >= r.Annex && at < r.AnnexEnd {
		set("annex", "", at-r.Annex, fmt.Sprintf("in the memory that %s keeps near %s", r.Release, r.Image))
	}
	var nearest *patcher.Site
	for i := range r.Sites {
		s := &r.Sites[i]
		entry := r.Base + target.Addr(s.RVA)
		switch {
		case s.Pad != nil && at >= s.Pad.At && at < s.Pad.At+target.Addr(len(s.Pad.New)):
			set("pad", s.Function, at-s.Pad.At, "the long jump before "+s.Function)
		case at >= s.At && at < s.At+target.Addr(len(s.New)):
			set("site", s.Function, at-entry, "the redirected entry of "+s.Function)
		case at >= entry && at < entry+target.Addr(s.Length):
			set("old-function", s.Function, at-entry, "the old body of "+s.Function+", which old callers may still be in")
		case s.Slot != 0 && at >= s.Slot && at < s.Slot+8:
			set("slot", s.Function, at-s.Slot, "the jump slot of "+s.Function)
		case s.Target != 0 && at >= s.Target && at < r.AnnexEnd && (nearest == nil || s.Target > nearest.Target):
			nearest = s
		}
	}
	if doc.Kind == "annex" && nearest != nil {
		set("new-function", nearest.Function, at-nearest.Target, fmt.Sprintf("in or behind the new %s of %s", nearest.Function, r.Release))
	}
}

// maxDiagnoseHistory bounds the history in a support file.
const maxDiagnoseHistory = 1000

// Diagnose packs what a support request needs; no memory of any process.
func (a *Agent) Diagnose(ctx context.Context, c control.Caller) ([]byte, error) {
	s := a.shown.Load()
	h, err := a.History(ctx, c, maxDiagnoseHistory)
	if err != nil {
		return nil, err
	}
	settings, err := a.Policy(ctx, c) // as on a screen: a proxy's password is taken out of it
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	z := zip.NewWriter(&buf)
	put := func(name string, v any) error {
		f, err := z.CreateHeader(&zip.FileHeader{Name: name, Method: zip.Deflate, Modified: a.o.Now().UTC()})
		if err != nil {
			return err
		}
		e := json.NewEncoder(f)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	recs := a.allRecords()
	err = errors.Join(put("status.json", s.status), put("eligibility.json", s.eligibility), put("list.json", s.offers),
		put("processes.json", s.processes), put("records.json", recs), put("history.json", h), put("settings.json", settings))
	err = errors.Join(err, z.Close()) // before the bytes are taken: Close writes the directory
	return buf.Bytes(), err
}

// Subscribe streams what happens until ctx ends.
func (a *Agent) Subscribe(ctx context.Context, _ control.Caller) (<-chan control.Event, error) {
	ch := a.hub.subscribe()
	go func() {
		select {
		case <-ctx.Done():
		case <-a.done:
		}
		a.hub.leave(ch)
	}()
	return ch, nil
}

// textfileTemp is the suffix of a metrics file being written.
const textfileTemp = ".tmp"

// WriteMetrics replaces the textfile of a collector as a whole.
func (a *Agent) WriteMetrics(ctx context.Context, path string) error {
	b, err := a.Metrics(ctx)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+textfileTemp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(path+textfileTemp, filepath.Clean(path))
}
