// Package agent is the loop of the daemon: gather a view, decide, perform,
// publish. One goroutine owns the state; control reads a published snapshot
// and hands its wishes to that goroutine.
//
// Desired is what verified releases, policy and holds come to; actual is the
// processes, their images and our records. Process start, fork, reboot, crash,
// new release, policy change and rollback each only wake the same loop: losing
// a wake-up costs latency, never correctness.
//
// SECURITY. The daemon runs as root. It parses, in this order of trust: its
// configuration and policy (root's), its state file (its own), TUF metadata and
// releases (verified to the root of trust before they are parsed as releases),
// requests on the control socket (any local user; peer credentials decide), and
// memory of foreign processes (hostile until hashed). Nothing is applied that
// was not verified, and nothing applied is undone because a server, a clock or
// a network failed, nor by stop, upgrade or crash of the daemon.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent/control"
	"hotpatchd/agent/repository"
	"hotpatchd/agent/store"
	"hotpatchd/eligibility"
	"hotpatchd/eligibility/probe"
	"hotpatchd/patcher"
	"hotpatchd/patcher/target"
)

// Options are what the daemon's shell supplies.
type Options struct {
	Config  *Config
	Backend target.Backend
	// Facts reads the device anew; it is asked at start and once an hour.
	Facts   func(ctx context.Context) eligibility.Facts
	Device  func(eligibility.Facts) probe.Device
	Boot    string // id of this boot; records of another are over. "" = not known, records are judged by process alone
	Log     *zap.Logger
	Version string
	Now     func() time.Time
	// HostEvents tells, until ctx ends, when the machine has slept, its clock was
	// set, or its network has changed: WatchHost. nil: nobody tells.
	HostEvents func(ctx context.Context, tell func(what string))
	// Slept is how long the machine has been asleep since its start; nil: it never is.
	Slept func() time.Duration
	// SystemImage tells whether the operating system hotpatches the image of a
	// file itself; nil: none.
	SystemImage func(path string) bool
	// Management is device management's word over the policy file; nil where
	// there is none. Settings are the configuration as it is in force, for people.
	Management Management
	Settings   []control.Setting
	// Hands refuses a file that strangers may change: the policy, each time before
	// it is read. fs.ErrNotExist is no refusal. nil: every file is taken.
	Hands func(file string) error
	Ready func() // called once, after records were recovered and the first pass is done
}

// Agent is the daemon's heart. Its methods that serve control may be called
// from any goroutine; everything else belongs to Run.
type Agent struct {
	o      Options
	log    *zap.Logger
	store  state
	client *repository.Client // nil: no repository configured, or it cannot work
	wake   chan struct{}
	calls  chan func()
	done   chan struct{} // closed when Run returns

	// Owned by the loop.
	policy         *Policy
	policyErr      error
	shownPolicy    []control.Setting // of the policy in force
	managedAtStart *settings         // of the configuration
	facts          eligibility.Facts
	factsAt        time.Time
	verdict        eligibility.Verdict
	requirements   map[eligibility.ID]checkStands // since when
	sinces         sinces
	slept          time.Duration // as of the last look at it
	device         probe.Device
	offers         []repository.Offer
	local          map[string]repository.Offer // installed from files with their own metadata
	skipped        []repository.Skipped
	verified       bool // some metadata was verified, now or in a former life
	expires        time.Time
	checkedAt      time.Time // last check that succeeded
	repoErr        *control.RepositoryError
	outside        outside
	releases       map[string]*loaded
	loading        map[string]bool
	retryLoad      map[string]time.Time
	bases          baselines
	procs          map[target.ID]*procState
	hosts          map[target.ID]*procState // those with images, and those that could not be looked into
	lives          map[int]target.ID        // of procs, by pid
	departed       map[int]*departed        // by pid
	observed       map[caseKey]bool         // owner and release: the guard has spoken of it
	letOut         map[string]bool          // releases that came out of their trial
	starts         starts
	latency        latency
	scannedAt      time.Time
	listedAt       time.Time // the last list of all processes began, by a clock that nobody sets
	scanErr        error
	scanCost       time.Duration // of looking at the processes, the last time
	denied         int           // processes that could not be looked into
	unread         int           // processes that have mapped too much to be looked into
	rows           map[rowKey]row
	trials         map[string]time.Time // release → when its first process was patched
	vigil          *vigil
	ends           <-chan target.Event // of followed lives; nil: the backend tells none, or all with the starts
	followed       map[target.ID]bool  // nil: the backend needs not be told whom to follow
	harms          harms
	programsAt     time.Time            // when what is known of programs was stored
	checked        map[string]time.Time // record → when it was last compared with memory
	notices        []control.Attention
	dirty          bool
	again          time.Time          // when the next attempt is due, zero if none waits
	begins         time.Time          // until then this pass begins work on processes
	more           bool               // this pass has left something to the next one
	left           map[target.ID]*job // steps that do not end
	patience       time.Duration      // stepMost
	share          time.Duration      // turnMost
	listing        chan listed        // of a list that was not waited for, nil if there is none
	hour           hour               // as of the last publication
	freeze         string             // the backend's sentence on what it may reach
	method         string             // how it stops threads

	recMu      sync.Mutex
	records    map[string]patcher.Record
	stateErr   error // the last write of the state failed
	stateSince time.Time

	reporting *reporting // nil: nowhere
	unwatched bool       // tests: nothing waits for the system or ticks, time is the test's
	promptly  bool       // tests: a start does not wait for its place in the fleet

	heart   *heart
	shown   atomic.Pointer[snapshot]
	hub     hub
	checkMu sync.Mutex // one refresh at a time
	checks  uint64     // that ended, imports too; under checkMu

	tookCheck uint64 // the newest of them that the loop has taken in
}

const (
	// factsEvery is how often the device is looked at anew.
	factsEvery = time.Hour
	// openTimeout bounds opening and reading one process.
	openTimeout = 10 * time.Second
	// maxNotices bounds what is kept of single events that a person should know.
	maxNotices = 20
)

// New opens the state and reads policy and facts. It touches no process.
func New(o Options) (*Agent, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	// The store makes the folder, with the protection that it needs.
	st, damage, err := store.Open(o.Config.stateFile())
	if err != nil {
		return nil, err
	}
	a := &Agent{
		o: o, log: o.Log, store: st,
		wake: make(chan struct{}, 1), calls: make(chan func()), done: make(chan struct{}),
		local: map[string]repository.Offer{}, releases: map[string]*loaded{}, loading: map[string]bool{}, retryLoad: map[string]time.Time{},
		procs: map[target.ID]*procState{}, hosts: map[target.ID]*procState{}, lives: map[int]target.ID{}, departed: map[int]*departed{}, observed: map[caseKey]bool{}, starts: starts{young: map[int]*young{}}, rows: map[rowKey]row{}, checked: map[string]time.Time{}, records: map[string]patcher.Record{}, dirty: true,
		vigil: newVigil(), left: map[target.ID]*job{}, patience: stepMost, share: turnMost, heart: newHeart(o.Config.Backend.ScanEvery),
	}
	if damage != nil {
		if damage.Moved == "" || damage.Word { // else attention says it, until the operator has looked
			a.notice("state-damaged", control.SeverityWarning, damage.String()+"; patches in memory are adopted", damage.Err.Error())
		}
		a.log.Error("the state was damaged", zap.String("text", damage.String()), zap.Bool("holds kept", damage.Word))
		a.history(own, control.HistoryEntry{Action: "state-damaged", Text: damage.String()})
	}
	if err := a.readState(); err != nil {
		st.Close()
		return nil, err
	}
	a.loadPolicy()
	if o.Slept != nil {
		a.slept = o.Slept()
	}
	if f, ok := o.Backend.(target.Freezer); ok {
		a.method = f.FreezeMethod()
	}
	if p, ok := o.Backend.(target.Prober); ok {
		ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
		a.freeze, err = p.Probe(ctx)
		cancel()
		if err != nil {
			a.freeze = err.Error()
		}
	}
	a.readFacts(context.Background())
	a.openRepository()
	a.openBaselines()
	a.openReporting()
	a.publish()
	return a, nil
}

// Close gives the state file back. Call it after Run has returned.
func (a *Agent) Close() error { return a.store.Close() }

// readState loads the records and the releases that came as files.
func (a *Agent) readState() error {
	return a.store.View(func(tx *store.Tx) error {
		recs, err := tx.Records()
		if err != nil {
			return err
		}
		for key, b := range recs {
			var r patcher.Record
			if err := json.Unmarshal(b, &r); err != nil {
				a.notice("record-damaged", control.SeverityWarning, "a record could not be read; the patch is adopted from memory", key+": "+err.Error())
				continue
			}
			a.records[key] = r
		}
		a.letOut = readLetOut(tx)
		a.trials, a.vigil.without, a.harms = readTrials(tx), readPrograms(tx), readHarms(tx)
		a.requirements, a.sinces = readChecks(tx), newSinces(readTimes(tx))
		b, ok := tx.Get(settingLocal)
		if ok {
			if err := json.Unmarshal(b, &a.local); err != nil {
				a.notice("local-damaged", control.SeverityWarning, "the list of releases installed from files could not be read", err.Error())
			}
		}
		return nil
	})
}

// Run works until ctx ends, or the state breaks: without a journal nothing may
// be done, and only a new start finds the way. First of all it brings records
// and memory together.
func (a *Agent) Run(ctx context.Context) error {
	defer close(a.done)
	a.history(own, control.HistoryEntry{Action: "start", Text: "hotpatchd " + a.o.Version + " started"})
	wctx, cancel := context.WithCancel(ctx)
	a.watchProcesses(wctx) // before the first list: what starts meanwhile is told
	a.followEnds(wctx)
	a.restartBaselines() // before any process is touched
	a.recoverAll(ctx)
	begun := time.Now()
	a.pass(ctx, "", nil)
	if a.o.Ready != nil {
		a.o.Ready()
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	a.watch(wctx, &wg)
	defer a.finish()
	timer := time.NewTimer(0)
	defer timer.Stop()
	woken, ended := false, time.Now()
	for {
		if err := a.store.Err(); err != nil {
			return fmt.Errorf("cannot go on without a journal; what is applied stays: %w", err)
		}
		wait := a.untilPass(begun, ended, woken)
		glance, young := a.untilGlance()
		young = young && glance < wait
		if young {
			wait = glance
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			a.history(own, control.HistoryEntry{Action: "stop", Text: "hotpatchd stopped; what is applied stays"})
			return nil
		case <-a.store.Broken():
		case fn := <-a.calls:
			a.heart.at("answering a request")
			fn()
			a.heart.at("")
		case <-a.wake:
			woken = true
		case e, ok := <-a.starts.events:
			if ok {
				a.takeEvents(e)
			} else { // the end
				a.starts.events = nil
			}
		case e, ok := <-a.ends:
			if ok {
				a.takeEnd(e, time.Now())
			} else {
				a.ends = nil
			}
		case <-timer.C:
			if young {
				a.glance(ctx)
				a.heart.at("")
				continue
			}
			woken = false
			// A state that was taken away shows now, not at the next order.
			if a.store.View(func(*store.Tx) error { return nil }); a.store.Err() != nil {
				continue
			}
			begun = time.Now()
			a.pass(ctx, "", nil)
			ended = time.Now()
		}
	}
}

const (
	// leastGap lets the wake-ups of one moment become one pass.
	leastGap = 50 * time.Millisecond
	// gapShare keeps looking at the processes, however often others start some,
	// under half a percent of a core.
	gapShare = 200
)

// gap is the least time between a pass and the next one that a wake-up brings.
func (a *Agent) gap() time.Duration {
	return min(max(leastGap, gapShare*a.scanCost), a.o.Config.Backend.ScanEvery)
}

// Wake makes the loop look again soon.
func (a *Agent) Wake() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Reload reads the policy anew.
func (a *Agent) Reload() { a.post(func() { a.loadPolicy(); a.dirty = true; a.Wake() }) }

// post hands a function to the loop without waiting.
func (a *Agent) post(fn func()) {
	go func() {
		select {
		case a.calls <- fn:
		case <-a.done:
		}
	}()
}

var errStopping = errors.New("the daemon is stopping")

// call runs fn in the loop and waits for it. What has begun is carried through
// even if the caller goes away, or is told that the loop is stalled.
func (a *Agent) call(ctx context.Context, fn func()) error {
	ran := make(chan struct{})
	t := time.NewTicker(heartLook)
	defer t.Stop()
	calls, begun, gone := a.calls, false, ctx.Done()
	for {
		select {
		case calls <- func() { defer close(ran); fn() }:
			calls, begun, gone = nil, true, nil
		case <-ran:
			return nil
		case <-gone:
			return ctx.Err()
		case <-a.done:
			return errStopping
		case <-t.C: // who waits for a loop that is dead is told so
			if err := a.errStalled(begun); err != nil {
				return err
			}
		}
	}
}

// untilPass is how long it is until the next pass: the scan interval from the
// beginning of the last one, whatever happens meanwhile, or less when something
// is to be tried again or woke the loop.
func (a *Agent) untilPass(begun, ended time.Time, woken bool) time.Duration {
	every := a.o.Config.Backend.ScanEvery
	d := max(every-time.Since(begun), min(leastGap, every)-time.Since(ended), 0)
	if a.more {
		return max(0, leastGap-time.Since(ended)) // so that requests come in between
	}
	if !a.again.IsZero() {
		d = min(d, max(a.again.Sub(a.o.Now()), time.Millisecond))
	}
	if woken {
		d = min(d, max(0, a.gap()-time.Since(ended)))
	}
	return d
}

// readFacts looks at the device and judges it.
func (a *Agent) readFacts(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	a.facts, a.factsAt = a.o.Facts(ctx), a.o.Now()
	a.device = a.o.Device(a.facts)
	a.judge()
}

// judge applies the policy to the facts.
func (a *Agent) judge() {
	profile := eligibility.Profile(a.o.Config.Eligibility.Profile)
	if profile == "auto" || profile == "" {
		profile = eligibility.ProfileOf(a.facts)
	}
	a.verdict = eligibility.Judge(profile, a.facts, a.policy.Judged(a.policyPlace(), a.policyErr))
	a.dirty = true
	a.noteChecks()
}

func openChecks(v eligibility.Verdict) []string {
	out := []string{}
	for _, c := range v.Checks {
		if c.Open() {
			out = append(out, string(c.ID))
		}
	}
	return out
}

// loadPolicy reads the policy; a wrong one leaves the last good one in force, loudly.
func (a *Agent) loadPolicy() {
	a.noticeConfiguration()
	p, shown, err := a.readPolicy()
	if err != nil {
		if a.policyErr == nil || a.policyErr.Error() != err.Error() {
			a.log.Error("policy refused, the last good one stays in force", zap.Error(err))
			why, _, _ := strings.Cut(err.Error(), "\n") // the lines after it show the place in the file
			a.history(own, control.HistoryEntry{Action: "policy-refused", Text: why})
		}
		a.policyErr = err
		if a.facts != nil {
			a.judge()
		}
		return
	}
	if a.policy != nil && a.policyErr == nil && reflect.DeepEqual(p, a.policy) && slices.Equal(shown, a.shownPolicy) {
		return // nothing new in it
	}
	if a.policy != nil {
		a.log.Info("policy read", zap.String("file", p.File), zap.Bool("absent", p.Absent))
		text := "the policy was read anew" + changedSettings(a.shownPolicy, shown)
		if at, ok := a.sinces.at[sincePolicy]; ok && a.policyErr != nil {
			text += ", after it was refused for " + control.Span(a.o.Now().Sub(at))
		}
		a.history(own, control.HistoryEntry{Action: "policy", Text: text})
	}
	a.policy, a.policyErr, a.shownPolicy = p, nil, shown
	if a.facts != nil {
		a.judge()
	}
}

// readPolicy loads the policy, unless strangers may change it.
func (a *Agent) readPolicy() (*Policy, []control.Setting, error) {
	if a.o.Hands != nil {
		if err := a.o.Hands(a.o.Config.Policy.File); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, &policyError{ErrPolicyUnreadable, fmt.Errorf("cannot use %s as the policy: %w", a.o.Config.Policy.File, err)}
		}
	}
	return LoadManagedPolicy(a.o.Config.Policy.File, a.o.Management)
}

// notice keeps something a person should know; detail goes to the log only.
func (a *Agent) notice(code, severity, text, detail string) {
	a.noticeTo(control.Scope{Public: true}, code, severity, text, detail)
}

// noticeTo is notice for some only.
func (a *Agent) noticeTo(scope control.Scope, code, severity, text, detail string) {
	a.log.Warn(text, zap.String("code", code), zap.String("detail", detail))
	for i := range a.notices {
		if a.notices[i].Code == code && a.notices[i].Text == text {
			return
		}
	}
	if len(a.notices) == maxNotices {
		a.notices = a.notices[1:]
	}
	a.notices = append(a.notices, control.Attention{Code: code, Severity: severity, Since: control.At(a.o.Now()), Text: text, Scope: scope})
	a.dirty = true
}
