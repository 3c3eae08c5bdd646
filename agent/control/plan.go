package control

// Plan is what would be done to which process. Looking changes nothing.
type Plan struct {
	Header
	Release   string           `json:"release"`
	Sequence  int64            `json:"sequence"`
	Product   string           `json:"product"`
	Title     string           `json:"title"`
	Coverage  Coverage         `json:"coverage"` // expected after the work
	Refused   *Refusal         `json:"refused"`  // why install would refuse it as a whole, null if it would not
	Waits     *Refusal         `json:"waits"`    // why it is not done by itself now, null if it is or if install would refuse it too
	Processes []PlannedProcess `json:"processes"`
}

// PlannedProcess is one process and what would be done to its images.
type PlannedProcess struct {
	PID     int            `json:"pid"`
	Start   uint64         `json:"start,string"`
	Exe     string         `json:"exe"`
	Host    string         `json:"host"`
	User    string         `json:"user"`
	Unit    string         `json:"unit"`
	Threads int            `json:"threads"` // 0: not counted
	Inside  int            `json:"inside"`  // threads in the way at this moment
	Images  []PlannedImage `json:"images"`

	UID int `json:"-"`
}

// PlannedImage is what would be done to one image. With a pid in the query the
// places are given byte by byte, in the order in which they would be written.
type PlannedImage struct {
	Name        string        `json:"name"`
	Base        Addr          `json:"base"`
	Product     string        `json:"product"`
	Release     string        `json:"release"`
	Sequence    int64         `json:"sequence"`
	Replaces    string        `json:"replaces"` // release in force in this image now, "" if none
	State       ImageState    `json:"state"`    // expected after the work
	ReasonCode  string        `json:"reason_code"`
	Reason      string        `json:"reason"`
	Remedy      Remedy        `json:"remedy"`
	Functions   []PlannedFunc `json:"functions"`
	Identity    *Identity     `json:"identity,omitempty"`
	Consistency string        `json:"consistency,omitempty"` // entry or quiescent
	Sites       []Site        `json:"sites,omitempty"`
	Annex       *Annex        `json:"annex,omitempty"`
	Binds       []Bind        `json:"binds,omitempty"`
	Refused     *Refusal      `json:"refused,omitempty"`
}

// PlannedFunc is a function that would be replaced.
type PlannedFunc struct {
	Name    string `json:"name"` // a label
	RVA     Addr   `json:"rva"`
	Size    uint64 `json:"size"`    // bytes of the old body
	Address Addr   `json:"address"` // of the old entry
	New     Addr   `json:"new"`     // of the new function; 0 without a pid in the query
	Method  string `json:"method"`  // "two-byte jump into owned filler"
}

// Identity is what tells one build of an image from another.
type Identity struct {
	Machine     uint16 `json:"machine"`
	SizeOfImage uint32 `json:"size_of_image"`
	TimeStamp   uint32 `json:"time_stamp"`
	CheckSum    uint32 `json:"checksum"`
	RSDS        string `json:"rsds"`
}

// Site is one place that would be written.
type Site struct {
	Name     string   `json:"name"` // the function
	RVA      Addr     `json:"rva"`
	Address  Addr     `json:"address"`
	Kind     string   `json:"kind"`      // entry, pad or slot
	OldBytes string   `json:"old_bytes"` // hex digits, no blanks
	NewBytes string   `json:"new_bytes"`
	OldText  []string `json:"old_text"` // disassembly, one line an instruction
	NewText  []string `json:"new_text"`
	Order    int      `json:"order"` // 1 is written first
}

// Bind is a place of the hotpatch image that would be bound to the base or to another module.
type Bind struct {
	Name  string `json:"name"`
	Kind  string `json:"kind"` // pointer, import
	Found bool   `json:"found"`
	Text  string `json:"text,omitempty"`
}

// Refusal is why it cannot be done.
type Refusal struct {
	Code string `json:"code"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"` // what to do
}
