package control

// Offers is what the repository offers and what of it fits this device.
type Offers struct {
	Header
	Eligible bool    `json:"eligible"` // false: nothing of it is installed here
	Releases []Offer `json:"releases"`
}

// Offer is one release of the repository.
type Offer struct {
	ID         string   `json:"id"`
	Product    string   `json:"product"`
	Kind       string   `json:"kind"` // hotpatch or baseline
	Sequence   int64    `json:"sequence"`
	Month      string   `json:"month"`
	Baseline   string   `json:"baseline"`
	Title      string   `json:"title"`
	Severity   string   `json:"severity"`
	CVEs       []string `json:"cves"`
	Fits       bool     `json:"fits"`
	ReasonCode string   `json:"reason_code"` // why it does not fit
	Reason     string   `json:"reason"`
	InForce    bool     `json:"in_force"`
	Held       bool     `json:"held"`
	Halted     bool     `json:"halted"` // stopped by its publisher
	Published  Time     `json:"published"`
}

// Processes is the state and reason of every image that a release names.
type Processes struct {
	Header
	Coverage  Coverage  `json:"coverage"`  // of the whole device, also where rows are filtered
	Others    int       `json:"others"`    // processes that have loaded nothing a release names
	Release   string    `json:"release"`   // id of the most urgent release, "" if none
	Sequence  int64     `json:"sequence"`  // of that release
	Scanned   Time      `json:"scanned"`   // null: first scan not done
	Processes []Process `json:"processes"` // those asked for that the caller may see
}

// Process is one process and its images.
type Process struct {
	PID    int     `json:"pid"`
	Start  uint64  `json:"start,string"` // with PID names one life of the process; only equality means anything
	Exe    string  `json:"exe"`          // the PE program
	Host   string  `json:"host"`         // the native program that runs it, "" if it runs by itself
	User   string  `json:"user"`
	Unit   string  `json:"unit"` // systemd unit, container or job
	Images []Image `json:"images"`

	UID int `json:"-"` // owner; decides who else may read the row, does not travel
}

// Image is one image in one process. Reason must not carry addresses or bytes:
// those belong into Detail, which only administrators get.
type Image struct {
	Name       string     `json:"name"`
	Base       Addr       `json:"base"`
	Product    string     `json:"product"`
	Release    string     `json:"release"`
	Sequence   int64      `json:"sequence"`
	State      ImageState `json:"state"`
	ReasonCode string     `json:"reason_code"`
	Reason     string     `json:"reason"`
	Since      Time       `json:"since"`
	Remedy     Remedy     `json:"remedy"`
	ToDo       string     `json:"to_do"`    // a sentence or command, where it says more than the remedy
	PauseUS    int64      `json:"pause_us"` // how long all threads stood, microseconds; 0 if never
	Attempts   int        `json:"attempts"`

	Detail string `json:"detail,omitempty"`
	Path   string `json:"path,omitempty"`  // of the image's file, if known
	Annex  *Annex `json:"annex,omitempty"` // so that a crash address can be told
}

// Annex is the memory the daemon allocated near an image.
type Annex struct {
	Address   Addr            `json:"address"`
	Size      uint64          `json:"size"` // bytes
	Segments  []Segment       `json:"segments"`
	Functions []AnnexFunction `json:"functions"`
}

// Segment is a part of an annex with one protection.
type Segment struct {
	Address Addr   `json:"address"`
	Size    uint64 `json:"size"`
	Prot    string `json:"prot"` // "r-x"
}

// AnnexFunction is a new function in an annex.
type AnnexFunction struct {
	Name    string `json:"name"`
	Address Addr   `json:"address"`
	Size    uint64 `json:"size"`
}

// Change is what install, rollback, hold and the like have done.
type Change struct {
	Header
	Action   string    `json:"action"` // install, rollback, hold, release-hold, pause, resume
	Changed  bool      `json:"changed"`
	Release  string    `json:"release"`  // the release named or chosen
	Sequence int64     `json:"sequence"` // of that release
	Product  string    `json:"product"`
	Previous string    `json:"previous"` // after a rollback: the release in force now, "" if none
	State    State     `json:"state"`    // of the device, afterwards
	Coverage Coverage  `json:"coverage"` // of the release's product, afterwards
	Results  []Process `json:"results"`
	Reopened []string  `json:"reopened"` // CVEs that are open again
	Lifted   bool      `json:"lifted"`   // a hold on the release was lifted
	Verified string    `json:"verified"` // how the release was verified, one sentence
	Text     string    `json:"text"`     // one sentence on what happened or why nothing did
}

// Verify is the result of reading every site again from memory.
type Verify struct {
	Header
	OK         bool       `json:"ok"` // no mismatch, nothing left unread
	Processes  int        `json:"processes"`
	Images     int        `json:"images"`
	Sites      int        `json:"sites"` // read and compared
	Mismatches []Mismatch `json:"mismatches"`
	Unread     []Mismatch `json:"unread"`  // could not be read: Text says why
	History    string     `json:"history"` // "" if the history's chain of hashes holds, else the first bad entry
}

// Mismatch is a site whose bytes are not what the record says.
type Mismatch struct {
	PID      int    `json:"pid"`
	Start    uint64 `json:"start,string"`
	Exe      string `json:"exe"`
	Image    string `json:"image"`
	Function string `json:"function"`
	RVA      Addr   `json:"rva"`
	Address  Addr   `json:"address"`
	Expected string `json:"expected"` // hex bytes
	Found    string `json:"found"`
	Text     string `json:"text"`
}

// History is what was done, newest first.
type History struct {
	Header
	Entries []HistoryEntry `json:"entries"`
	Broken  string         `json:"broken"` // "" if the chain of hashes holds, else the first bad entry
}

// HistoryEntry is one thing done. Hash covers the previous hash and the
// entry's own JSON without "hash".
type HistoryEntry struct {
	Seq     uint64            `json:"seq"`
	Time    Time              `json:"time"`
	Caller  HistoryCaller     `json:"caller"`
	Action  string            `json:"action"`
	Product string            `json:"product,omitempty"`
	Release string            `json:"release,omitempty"`
	PID     int               `json:"pid,omitempty"`
	Exe     string            `json:"exe,omitempty"`
	Image   string            `json:"image,omitempty"`
	Text    string            `json:"text,omitempty"`
	Detail  map[string]string `json:"detail,omitempty"`
	Prev    string            `json:"prev"`
	Hash    string            `json:"hash,omitempty"`
}

// HistoryCaller is who asked for it. The daemon itself is the user "hotpatchd" with its own pid.
type HistoryCaller struct {
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
	User string `json:"user"`
	SID  string `json:"sid,omitempty"` // Windows only
	PID  int    `json:"pid"`
}

// Explain says what lies at an address of a process.
type Explain struct {
	Header
	PID      int    `json:"pid"`
	Start    uint64 `json:"start,string"`
	Exe      string `json:"exe"`
	Address  Addr   `json:"address"`
	Kind     string `json:"kind"` // site, pad, slot, new-function, old-function, annex, image, elsewhere
	Image    string `json:"image"`
	Release  string `json:"release"`
	Function string `json:"function"`
	Offset   uint64 `json:"offset"` // from the function's start, bytes
	Text     string `json:"text"`   // one sentence
}
