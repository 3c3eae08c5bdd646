package patcher

import (
	"fmt"
	"time"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// State is where a record stands.
type State string

const (
	Staging  State = "staging"  // annex being mapped and filled
	Staged   State = "staged"   // annex complete, entries untouched
	Swapping State = "swapping" // entries being written
	Applied  State = "applied"
	Undoing  State = "undoing"
	Undone   State = "undone" // entries are original; annex and pads remain ours
	Gave     State = "failed" // given up; memory is as before
	Lost     State = "lost"   // process, image or boot is over: touch nothing
	TornUp   State = "torn"   // could not be written back
)

// Site is one function's place in one process: what stood there, what stands
// there now, what shall.
type Site struct {
	Function string      `json:"function"`
	RVA      uint32      `json:"rva"`    // entry in the base
	Length   uint32      `json:"length"` // of the body
	Kind     string      `json:"kind"`
	At       target.Addr `json:"at"`       // bytes rewritten at the entry
	Original []byte      `json:"original"` // as the base has them, relocated for this process
	// Canonical is Original with relocations undone: as in the base's file.
	Canonical []byte      `json:"canonical"`
	Prev      []byte      `json:"prev"` // before this record: Original, or an older sequence's
	New       []byte      `json:"new"`
	Pad       *Pad        `json:"pad,omitempty"`
	Target    target.Addr `json:"target,omitempty"` // the new function; 0 where an older one is taken out
	Slot      target.Addr `json:"slot,omitempty"`
	// Interior are the instruction boundaries strictly inside the bytes that
	// stand at At when this record is swapped in.
	Interior []target.Addr `json:"interior,omitempty"`
}

// Pad is owned filler before an entry.
type Pad struct {
	At       target.Addr `json:"at"`
	Original []byte      `json:"original"`
	Prev     []byte      `json:"prev"`
	New      []byte      `json:"new"`
}

// Record is what is known of one patch in one image of one process: enough to
// undo it, or to find out how far it got. It is JSON in the store.
type Record struct {
	ID       target.ID     `json:"id"`
	Boot     string        `json:"boot,omitempty"` // boot it belongs to; set by the caller
	Image    string        `json:"image"`
	Base     target.Addr   `json:"base"`
	Size     uint32        `json:"size"`
	Identity pe.Identity   `json:"identity"`
	Product  string        `json:"product"`
	Release  string        `json:"release"`
	Sequence uint32        `json:"sequence"`
	Hash     string        `json:"hash"` // SHA-256 of the hotpatch image, hex
	State    State         `json:"state"`
	Annex    target.Addr   `json:"annex"`
	AnnexEnd target.Addr   `json:"annex_end"`
	Parts    []target.Span `json:"parts"` // what was mapped, part by part
	Nonce    string        `json:"nonce"`
	AnnexSum string        `json:"annex_sum"` // SHA-256 of the annex header, hex
	Header   string        `json:"header"`    // SHA-256 of the base's first bytes as checked under the freeze, hex
	Sites    []Site        `json:"sites"`
	Previous *Record       `json:"previous,omitempty"` // the older sequence this one replaces: in force again if the swap does not happen
	Pause    time.Duration `json:"pause"`
	Attempts int           `json:"attempts"`
	Adopted  bool          `json:"adopted,omitempty"`
	Note     string        `json:"note,omitempty"`
	At       time.Time     `json:"at"`
}

// Key tells records apart: one life, one image base, one product.
func (r Record) Key() string {
	return fmt.Sprintf("%d/%x/%x/%s", r.ID.PID, r.ID.Start, uint64(r.Base), r.Product)
}

// Live tells whether entries are, or may be, redirected by this record.
func (r Record) Live() bool {
	return r.State == Applied || r.State == Swapping || r.State == Undoing || r.State == TornUp
}
