package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"hotpatchd/agent/control"
	"hotpatchd/agent/release"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
)

// takeFile verifies what came as a file and returns the ids to install, the
// most urgent first: of a release that trusted metadata names, or that comes
// with the metadata that lay beside it, its own; of an export, for each product
// the highest that it holds and that may be installed here; said is what else
// came of it where that is none. Metadata that came along is taken over as that
// of a check is, floors and all.
func (a *Agent) takeFile(ctx context.Context, c control.Caller, r control.InstallRequest) (ids []string, said string, err error) {
	if a.client == nil {
		return nil, "", &control.Error{Code: control.CodeConflict, Text: "the file is refused: there is no root of trust to verify it by",
			Hint: "put the publisher's root.json at " + a.o.Config.Repository.Root + " and restart the daemon"}
	}
	export := repository.IsExport(r.File)
	if !export {
		if _, err := release.Open(r.File); err != nil {
			return nil, "", refusedFile(err)
		}
		o, err := a.client.VerifyFile(r.File)
		if err == nil {
			if err := a.keepLocal(r.File); err != nil {
				return nil, "", control.Errorf(control.CodeInternal, "the release cannot be stored: %v", err)
			}
			return []string{o.ID}, "", a.call(ctx, func() { a.verified = true })
		}
		if len(r.Metadata) == 0 {
			return nil, "", refusedFile(err)
		}
	}
	a.checkMu.Lock()
	var cat *repository.Catalog
	var held []repository.Offer
	if export {
		cat, held, err = a.client.Import(r.File)
	} else {
		cat, held, err = a.client.ImportFile(r.Metadata, r.File)
	}
	floors := a.client.Floors()
	a.checks++
	n := a.checks
	a.checkMu.Unlock()
	var serr error
	cerr := a.call(ctx, func() {
		newest := a.newest(n)
		if err != nil { // what verified before it was refused counts all the same
			if newest {
				serr = a.update(func(tx *store.Tx) error { return setting(tx, settingFloors, floors) })
			}
			return
		}
		if newest {
			if serr = a.asked(floors, false); serr != nil {
				return
			}
			a.checkedAt = a.o.Now()
			a.take(cat)
		}
		serr = a.update(func(tx *store.Tx) error {
			_, err := tx.Append(stamped(control.HistoryEntry{Action: "import", Text: "metadata and releases came as a file: " + idsOf(held)}, c, a))
			return err
		})
		var stops []string
		if export {
			held, stops = a.unhalted(held)
		}
		ids = a.best(held)
		if len(ids) == 0 && len(stops) > 0 {
			said = "the export was taken over; there is nothing to install: " + strings.Join(stops, "; ")
		}
	})
	switch {
	case cerr != nil:
		return nil, "", cerr
	case err != nil:
		return nil, "", refusedFile(err)
	case serr != nil:
		return nil, "", control.Errorf(control.CodeInternal, "what the file says cannot be kept: %v", serr)
	case len(ids) == 0 && said != "":
		return nil, said, nil
	case len(ids) == 0:
		return nil, "", &control.Error{Code: control.CodeNotFound, Text: "the export was taken over, but it holds no release for this device: " + idsOf(held),
			Hint: "hotpatch list shows why not"}
	}
	return ids, "", nil
}

// unhalted leaves out of an export what its publisher halted, and of the same
// products what is older than one in force: back to that leads the halt itself, if
// it says undo. stops says which halts.
func (a *Agent) unhalted(held []repository.Offer) (rest []repository.Offer, stops []string) {
	in := a.wishes().InForce
	kept := map[string]repository.Offer{}
	for _, o := range held {
		if !o.Rollout.Halt {
			continue
		}
		stops = append(stops, o.ID+": "+halted(o).Text)
		if in[o.Product] == o.ID {
			kept[o.Product] = o
		}
	}
	for _, o := range held {
		k, ok := kept[o.Product]
		older := ok && o.Baseline == k.Baseline && o.Kind == k.Kind && o.Sequence < k.Sequence
		if !o.Rollout.Halt && !older {
			rest = append(rest, o)
		}
	}
	return rest, stops
}

// best are the highest releases by product that may be installed, the most
// urgent first. One release that may not be is named all the same: its install says why not.
func (a *Agent) best(held []repository.Offer) []string {
	if len(held) == 1 {
		return []string{held[0].ID}
	}
	w, d := a.wishes(), a.deviceFor()
	top := map[string]repository.Offer{}
	for _, o := range held {
		delete(w.Broken, o.ID) // its load, which follows, has the last word
		if _, ok := installable(o, d, w); !ok {
			continue // also what is held: only an order for that one release lifts a hold
		}
		if old, ok := top[o.Product]; !ok || highest(o, old) < 0 {
			top[o.Product] = o
		}
	}
	var list []repository.Offer
	for _, o := range top {
		list = append(list, o)
	}
	slices.SortFunc(list, func(x, y repository.Offer) int {
		switch {
		case sooner(x, y, w):
			return -1
		case sooner(y, x, w):
			return 1
		}
		return strings.Compare(x.Product, y.Product)
	})
	ids := make([]string, len(list))
	for i, o := range list {
		ids[i] = o.ID
	}
	return ids
}

func idsOf(offers []repository.Offer) string {
	ids := make([]string, len(offers))
	for i, o := range offers {
		ids[i] = o.ID
	}
	return strings.Join(ids, ", ")
}

// refusedFile is why a file is not taken, for the person who brought it.
func refusedFile(err error) error {
	e := &control.Error{Code: control.CodeConflict, Text: "the file is refused: " + err.Error(), Hint: "bring an export (hotpatch-build export), or the repository's metadata folder beside the file"}
	var re *repository.Error
	if errors.As(err, &re) {
		e.Text = "the file is refused: " + re.Text
		if re.Hint != "" && re.Code != repository.CodeUnknown && re.Code != repository.CodeNotFound {
			e.Hint = re.Hint
		}
	}
	return e
}

// joined makes one answer of two changes of one order.
func joined(sum, ch *control.Change) {
	sum.Changed, sum.Lifted = sum.Changed || ch.Changed, sum.Lifted || ch.Lifted
	sum.State = ch.State
	sum.Results = append(sum.Results, ch.Results...)
	for _, p := range ch.Results {
		sum.Coverage.Processes++
		for _, im := range p.Images {
			sum.Coverage.Add(im.State)
		}
	}
	sum.Text = strings.TrimPrefix(fmt.Sprintf("%s. also installed: %s", sum.Text, ch.Release), ". ")
}
