package agent

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// Plan tells what a release would do to which process. It is the plan that
// apply uses; nothing is changed by looking.
func (a *Agent) Plan(ctx context.Context, c control.Caller, q control.PlanQuery) (*control.Plan, error) {
	var o repository.Offer
	var cerr *control.Error
	var refused *control.Error
	var waits *control.Refusal
	if err := a.call(ctx, func() {
		if o, cerr = a.offerFor(q.ID); cerr == nil {
			refused, waits = a.mayInstall(o), a.waits(o)
		}
	}); err != nil {
		return nil, err
	}
	if cerr != nil {
		return nil, cerr
	}
	l := a.load(ctx, o)
	if l.problem.Code != "" {
		return nil, &control.Error{Code: control.CodeConflict, Text: l.problem.Text}
	}
	doc := &control.Plan{Release: o.ID, Sequence: int64(o.Sequence), Product: o.Product, Title: o.Title, Processes: []control.PlannedProcess{}}
	doc.Waits = waits
	if refused != nil {
		doc.Refused = &control.Refusal{Code: string(refused.Code), Text: refused.Text, Hint: refused.Hint}
	}
	found := q.PID == 0
	late := 0
	err := a.call(ctx, func() {
		began, policy := time.Now(), a.policy
		for _, p := range a.procs {
			if q.PID != 0 && p.info.PID != q.PID {
				continue
			}
			found = true
			if time.Since(began) > beginForced {
				late++
				continue
			}
			pp, err := aside(ctx, a, p.info, "planning for", lookMost, func(ctx context.Context) (control.PlannedProcess, error) {
				return a.planProcess(ctx, p, l, policy, q.PID != 0), nil
			})
			if err != nil { // its rows say why
				if q.PID != 0 {
					late++
				}
				continue
			}
			if len(pp.Images) > 0 {
				doc.Coverage.Processes++
				for _, im := range pp.Images {
					doc.Coverage.Add(im.State)
				}
				doc.Processes = append(doc.Processes, pp)
			}
		}
	})
	if err == nil && late > 0 {
		err = control.Errorf(control.CodeConflict, "%s could not be looked into in time; hotpatch plan --pid N looks into one", counted(late, "process", "processes"))
	}
	if err == nil && !found {
		err = &control.Error{Code: control.CodeNotFound, Text: fmt.Sprintf("no process %d, or none that can be seen", q.PID)}
	}
	sortProcesses(doc.Processes)
	return doc, err
}

// planProcess plans for the images of one process. One that is over has none.
func (a *Agent) planProcess(ctx context.Context, p *procState, l *loaded, policy *Policy, full bool) control.PlannedProcess {
	out := control.PlannedProcess{PID: p.info.PID, Start: p.info.Start, Exe: programOf(p.info), User: p.info.User, Unit: p.info.Unit, UID: p.info.UID, Images: []control.PlannedImage{}}
	if p.info.Image != "" {
		out.Host = p.info.Host
	}
	var process target.Process
	var s *patcher.Survey
	for _, im := range p.images {
		named, same := match(&l.offer, &im.ImageView)
		if !named && !same {
			continue
		}
		pi := control.PlannedImage{Name: im.Name, Base: control.Addr(im.Base), Product: l.offer.Product, Release: l.offer.ID, Sequence: int64(l.offer.Sequence),
			State: control.OtherBuild, ReasonCode: "identity", Reason: "this build is not one that the release names", Remedy: control.RemedyAuthor,
			Functions: []control.PlannedFunc{}, Consistency: l.manifest.Consistency,
			Identity: &control.Identity{Machine: im.Identity.Machine, SizeOfImage: im.Identity.SizeOfImage, TimeStamp: im.Identity.TimeDateStamp, CheckSum: im.Identity.CheckSum, RSDS: im.Identity.RSDS}}
		if same {
			if process == nil {
				var err error
				if process, err = a.o.Backend.Open(ctx, p.info.ID); err != nil {
					if errors.Is(err, target.ErrGone) {
						out.Images = nil
						return out
					}
					a.refused(&pi, err)
					out.Images = append(out.Images, pi)
					continue
				}
				defer process.Close()
				s = patcher.Look(ctx, process)
			}
			a.planImage(ctx, process, s, im, l, policy, &pi, &out, full)
		}
		out.Images = append(out.Images, pi)
	}
	return out
}

// planImage prepares the plan of one image and shows it.
func (a *Agent) planImage(ctx context.Context, p target.Process, s *patcher.Survey, im *imageState, l *loaded, policy *Policy, out *control.PlannedImage, proc *control.PlannedProcess, full bool) {
	base, err := s.At(im.Base)
	var plan *patcher.Plan
	for _, patch := range l.patches {
		if err != nil || !sameHeaders(patch.Base, im.Identity) {
			continue
		}
		var r *patcher.Refusal
		plan, err = s.Prepare(base, patch)
		if errors.As(err, &r) && r.Reason == patcher.OtherBuild {
			out.Reason, err = r.Text, nil
			continue
		}
		break
	}
	var already *patcher.AlreadyApplied
	switch {
	case errors.As(err, &already):
		out.State, out.ReasonCode, out.Reason, out.Remedy = control.Patched, "in-force", l.offer.ID+" is in force already", control.RemedyNone
		return
	case err != nil:
		a.refused(out, err)
		return
	case plan == nil:
		return
	}
	out.State, out.ReasonCode, out.Reason, out.Remedy = control.Patched, "", "", control.RemedyNone
	if r, denied := a.deniedBy(policy, p.Info(), im.Name, im.Path); denied {
		out.State, out.ReasonCode, out.Reason, out.Remedy = control.Blocked, r.Code, r.Text, control.RemedyPolicy
	}
	if plan.Previous != nil {
		out.Replaces = plan.Previous.Release
	}
	for _, s := range plan.Sites {
		out.Functions = append(out.Functions, control.PlannedFunc{Name: s.Function, RVA: control.Addr(s.RVA), Size: uint64(s.Length), Address: control.Addr(s.At), New: control.Addr(s.Target), Method: s.Kind})
	}
	if full {
		a.showPlan(ctx, p, plan, l, out, proc)
	}
}

// byDeny begins the reason of what the policy denies; what the system denies has another.
const byDeny = "denied by policy"

// deniedByPolicy tells whether the policy denies an image, by its name or by
// the path of its file, in a process; or whether the system's own hotpatches
// are in the way: an entry that we redirect makes Windows refuse its hotpatch of that image.
func (a *Agent) deniedByPolicy(info target.Info, name, path string) (reason, bool) {
	return a.deniedBy(a.policy, info, name, path)
}

// deniedBy is deniedByPolicy by a policy that was in force when a step beside
// the loop began.
func (a *Agent) deniedBy(p *Policy, info target.Info, name, path string) (reason, bool) {
	if a.o.SystemImage != nil && path != "" && a.o.SystemImage(path) {
		return because("os-hotpatch", "Windows hotpatches its own images on this device: %s is left to it", name), true
	}
	if p == nil {
		return reason{}, false
	}
	for _, image := range []string{name, path} {
		if d, ok := p.Denied(programOf(info), info.User, image); ok {
			return because("denied", "%s: %s", byDeny, d), true
		}
	}
	return reason{}, false
}

// showPlan adds the places byte by byte, and counts the threads in the way now.
func (a *Agent) showPlan(ctx context.Context, p target.Process, plan *patcher.Plan, l *loaded, out *control.PlannedImage, proc *control.PlannedProcess) {
	for i, w := range plan.Places() {
		s := control.Site{Name: w.Function, RVA: control.Addr(w.RVA), Address: control.Addr(w.At), Kind: w.Kind,
			OldBytes: hex.EncodeToString(w.Old), NewBytes: hex.EncodeToString(w.New), OldText: []string{}, NewText: []string{}, Order: i + 1}
		for _, l := range patcher.Disassemble(stands(p, w), w.At) {
			if l.At < w.At+target.Addr(len(w.Old)) {
				s.OldText = append(s.OldText, l.Text)
			}
		}
		for _, l := range patcher.Disassemble(w.New, w.At) {
			s.NewText = append(s.NewText, l.Text)
		}
		out.Sites = append(out.Sites, s)
	}
	out.Annex = showAnnex(plan.Record, l)
	for i, prot := range plan.Protections() { // what will be asked of the system: the last word
		if i < len(out.Annex.Segments) {
			out.Annex.Segments[i].Prot = prot.String()
		}
	}
	for _, b := range plan.Binds {
		out.Binds = append(out.Binds, control.Bind{Name: b.What, Kind: b.Kind, Found: true})
	}
	regions, err := p.Regions()
	if err != nil {
		return
	}
	f, err := p.Freeze(ctx)
	if err != nil {
		return // the plan stands; how many threads there are is not known
	}
	n, err := plan.ThreadsInside(p, f, regions)
	if terr := f.Thaw(); terr != nil {
		a.log.Error("cannot thaw after looking; closing the handle releases it")
	}
	proc.Threads = n
	var r *patcher.Refusal
	if errors.As(err, &r) {
		proc.Inside = 1 // the first one found is named
		out.Reason, out.ReasonCode, out.Remedy = r.Text, r.Code, control.RemedyWait
	}
}

// stands is what stands at a place now, with the rest of the last instruction.
func stands(p target.Process, w patcher.Place) []byte {
	const instruction = 15
	b := make([]byte, len(w.Old)+instruction)
	if _, err := p.ReadAt(b, w.At); err != nil {
		return w.Old
	}
	return b
}

func (a *Agent) refused(out *control.PlannedImage, err error) {
	o := a.failed(Intent{Proc: &Proc{}, Image: &ImageView{}}, err)
	if o.try == nil {
		return
	}
	out.State, out.ReasonCode, out.Reason, out.Remedy = o.try.State, o.try.Reason.Code, o.try.Reason.Text, o.try.Remedy
	out.Refused = &control.Refusal{Code: o.try.Reason.Code, Text: o.try.Reason.Text}
}
