package patcher

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"hotpatchd/patcher/target"
	"hotpatchd/pe"
)

// Foreign memory may hold anything that looks like an annex. What decoding
// makes of a header, in memory and in time, is bounded before it is decoded,
// and for all headers of a process together.
const (
	maxAnnexHeader = 4 << 20 // bytes of JSON: 4095 functions at under 1 KiB each
	// maxHeaderObjects bounds the objects of one header: two a site, for as many
	// functions that come as go, and as many further ranges and parts again.
	maxHeaderObjects = 8 * maxFunctions
	// maxHeaderValues bounds what stands in an object, on average: a site has
	// eleven members, and four instruction boundaries at most.
	maxHeaderValues = 16
	// maxHeaderDepth: header, sites, site, pad; one to spare.
	maxHeaderDepth = 5

	// maxAnnexes bounds the annexes of one process: one for each sequence that
	// ever ran in each of its images.
	maxAnnexes = 1024
	// maxProbes bounds the places looked at in one process: a thousand images
	// have some ten thousand pages where a header could begin.
	maxProbes = 64 << 10
	// maxHeaders bounds what is read as headers of one process, bytes.
	maxHeaders = 32 << 20
	// maxObjects bounds what is decoded of them: an object takes some 600 bytes
	// of ours at most. Two of the largest fixes fit, or a thousand of usual size.
	maxObjects = 64 << 10
)

// headerBudget is what may still be spent on the headers of one process.
type headerBudget struct {
	bytes   uint64
	objects int
	buf     []byte // read into, again and again
}

// annexHeader is the JSON of the header. Keys are stable: an older daemon's
// annex must be read by a newer one.
type annexHeader struct {
	Nonce    string        `json:"nonce"`
	Base     target.Addr   `json:"base"`
	Size     uint64        `json:"size"` // bytes of the whole annex
	Identity pe.Identity   `json:"identity"`
	Image    string        `json:"image"`
	Product  string        `json:"product"`
	Release  string        `json:"release"`
	Sequence uint32        `json:"sequence"`
	Hash     string        `json:"hash"`
	Sites    []Site        `json:"sites"`
	Ranges   []pe.Span     `json:"ranges,omitempty"` // further parts of replaced functions
	Parts    []target.Span `json:"parts"`
	Header   string        `json:"header"`
}

func (h annexHeader) encode() ([]byte, error) {
	var out bytes.Buffer
	e := json.NewEncoder(&out)
	e.SetEscapeHTML(false) // names would outgrow the room kept for them
	if err := e.Encode(h); err != nil {
		return nil, err
	}
	body := out.Bytes()
	if len(body) > maxAnnexHeader {
		return nil, fmt.Errorf("annex header of %d bytes is over the limit of %d", len(body), maxAnnexHeader)
	}
	if _, ok := weigh(body); !ok { // nobody could read it back
		return nil, fmt.Errorf("annex header of %d bytes holds more than %d objects", len(body), maxHeaderObjects)
	}
	b := make([]byte, annexFixed, annexFixed+len(body))
	copy(b, annexMagic)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(body)))
	sum := sha256.Sum256(body)
	copy(b[16:], sum[:])
	return append(b, body...), nil
}

// weigh counts the objects of a JSON text without decoding it; false if it is
// more, or nested deeper, than a header of ours can be.
func weigh(body []byte) (objects int, ok bool) {
	depth, values := 0, 0
	inString, escaped := false, false
	for _, c := range body {
		switch {
		case escaped:
			escaped = false
		case inString:
			escaped, inString = c == '\\', c != '"'
		case c == '"':
			inString = true
		case c == '{' || c == '[':
			if c == '{' {
				objects++
			}
			values++ // the first in it, if any
			if depth++; depth > maxHeaderDepth {
				return objects, false
			}
		case c == '}' || c == ']':
			depth--
		case c == ',':
			values++
		}
		if objects > maxHeaderObjects || values > maxHeaderValues*maxHeaderObjects {
			return objects, false
		}
	}
	return objects, values <= maxHeaderValues*max(objects, maxFunctions)
}

// mayHoldHeader: header pages are private memory that can only be read.
func mayHoldHeader(r target.Region) bool {
	return r.Kind == target.Private && r.Inode == 0 && r.Prot == target.Read && !r.Shared
}

// probe finds the annexes that begin in some regions.
func (s *Survey) probe(regions []target.Region) error {
	probes := 0
	for _, r := range regions {
		if !mayHoldHeader(r) {
			continue
		}
		// Neighbouring mappings of one protection may be joined by the kernel:
		// look at every place where an annex could begin.
		for at := alignUp(r.Start, annexAlign); at < r.End && at >= r.Start; at += annexAlign {
			if probes++; probes > maxProbes || len(s.annexes) == maxAnnexes {
				return nil
			}
			if err := s.ctx.Err(); err != nil {
				return err
			}
			if err := s.take(at, uint64(r.End-at)); err != nil {
				return err
			}
		}
	}
	return nil
}

// take adds the annex at at, if there is one; room is how far its region goes.
// Errors are those of the process alone.
func (s *Survey) take(at target.Addr, room uint64) error {
	a, err := annexAt(s.p, at, room, &s.budget)
	switch {
	case err == nil:
		s.annexes = append(s.annexes, a)
	case errors.Is(err, target.ErrGone), errors.Is(err, target.ErrDenied):
		return err
	}
	return nil
}

var errNoAnnex = errors.New("no annex here")

func annexAt(p target.Process, at target.Addr, room uint64, budget *headerBudget) (annex, error) {
	var fixed [annexFixed]byte
	if _, err := p.ReadAt(fixed[:], at); err != nil {
		return annex{}, err
	}
	n := uint64(binary.LittleEndian.Uint32(fixed[8:]))
	if string(fixed[:8]) != annexMagic || n > maxAnnexHeader || n+annexFixed > room || n > budget.bytes {
		return annex{}, errNoAnnex
	}
	budget.bytes -= n
	if uint64(len(budget.buf)) < n {
		budget.buf = make([]byte, n)
	}
	body := budget.buf[:n]
	if _, err := p.ReadAt(body, at+annexFixed); err != nil {
		return annex{}, err
	}
	objects, ok := weigh(body)
	if !ok || objects > budget.objects {
		return annex{}, errNoAnnex
	}
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], fixed[16:48]) {
		return annex{}, errNoAnnex
	}
	budget.objects -= objects
	a := annex{At: at, sum: hex.EncodeToString(fixed[16:])}
	if json.Unmarshal(body, &a.annexHeader) != nil || !a.sane() {
		return annex{}, errNoAnnex
	}
	return a, nil
}

// maxHeaderText bounds a name in a header, bytes; those of images and releases
// are shorter, and so are those of functions, which are cut.
const maxHeaderText = 1024

// brief tells whether everything of free length is as short as we write it.
func (h annexHeader) brief() bool {
	for _, s := range []string{h.Image, h.Product, h.Release, h.Hash, h.Header, h.Identity.RSDS, h.Identity.TextSHA256} {
		if len(s) > maxHeaderText {
			return false
		}
	}
	for _, s := range h.Sites {
		if len(s.Function) > maxHeaderText || len(s.Kind) > maxHeaderText || len(s.Interior) >= longJump {
			return false
		}
	}
	return true
}
