package build

import (
	"errors"
	"fmt"

	"hotpatchd/pe"
)

// Code classifies a Refusal; scripts may rely on the values.
type Code string

// Why a base and a fix are not made into a hotpatch image.
const (
	CodeSequence     Code = "sequence"                   // 0 is not a sequence number
	Code32Bit        Code = "32-bit"                     // a PE32 image
	CodeFormat       Code = "format"                     // not a PE image, or a damaged one
	CodeMachine      Code = "machine"                    // base and fix are for different processors
	CodeHybrid       Code = "hybrid"                     // CHPE or ARM64X: two sets of code in one image
	CodeManaged      Code = "managed"                    // code that a runtime compiles
	CodeKind         Code = "kind"                       // the fix is not a DLL, or carries a hot patch table already
	CodeTLS          Code = "tls"                        // thread-local storage: a late image cannot have any
	CodeEntryPoint   Code = "entry-point"                // code that would have to run first
	CodeExports      Code = "changed-exports"            // the fix exports what the base has not
	CodeWritable     Code = "writable-data"              // a second copy of a variable of the base
	CodeRuntimeFixup Code = "runtime-fixup"              // data imports the C runtime would fix up, delayed imports
	CodeSymbol       Code = "no-symbol"                  // a name the base has not
	CodeAmbiguous    Code = "ambiguous-symbol"           // a name the base has twice
	CodeSymbolFile   Code = "symbols-mismatch"           // the symbol file is of another build
	CodeNothing      Code = "nothing-to-replace"         // no function of the base in the fix
	CodeLength       Code = "length"                     // the extent of a function is not certain
	CodeShort        Code = "too-short"                  // no room for a jump
	CodeJump         Code = "jump-into-entry"            // the bytes to be replaced are jumped into
	CodeInstruction  Code = "unknown-instruction"        // the first bytes cannot be read
	CodeOverlap      Code = "overlap"                    // two replaced functions share bytes
	CodeCaller       Code = "caller-relies-on-registers" // a caller in the base expects more of the function than the calling convention
)

// Refusal says why no image is made: reason, symbol, position and a sentence.
type Refusal struct {
	Code   Code
	Image  string // "base", "fix", or the name of a symbol file; "" if none is meant
	Symbol string // "" if none is meant
	At     uint32 // RVA in Image, 0 if no place is meant
	Text   string
	Err    error
}

func (r *Refusal) Error() string {
	s := string(r.Code) + ": "
	if r.Symbol != "" {
		s += r.Symbol + ": "
	}
	s += r.Text
	if r.At != 0 {
		s += fmt.Sprintf(" (%s at %x)", r.Image, r.At)
	}
	return s
}

func (r *Refusal) Unwrap() error { return r.Err }

func refuse(code Code, image, symbol string, at uint32, format string, a ...any) *Refusal {
	return &Refusal{Code: code, Image: image, Symbol: symbol, At: at, Text: fmt.Sprintf(format, a...)}
}

// damaged turns an error of package pe into a refusal.
func damaged(image string, err error) error {
	code := CodeFormat
	if errors.Is(err, pe.ErrNot64) {
		code = Code32Bit
	}
	name := image
	if image == "base" || image == "fix" {
		name = "the " + image
	}
	return &Refusal{Code: code, Image: image, Text: fmt.Sprintf("cannot read %s: %v", name, err), Err: err}
}
