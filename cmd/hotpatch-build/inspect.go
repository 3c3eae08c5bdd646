package main

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"hotpatchd/agent/release"
	"hotpatchd/pe"
)

func inspectCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "inspect FILE",
		Short: "show a PE image or a release: identity, load configuration, hot patch table",
		Long: `Shows any 64-bit PE image, or a release and the hotpatch images in it: what identifies the
image, its load configuration, and the hot patch table record by record. Tables that others
than hotpatch-build wrote are shown too; their extra words stay words.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := readInput(args[0])
			if err != nil {
				return err
			}
			if bytes.HasPrefix(b, []byte("PK")) {
				return inspectRelease(cmd.OutOrStdout(), b, asJSON)
			}
			v, err := viewImage(args[0], b)
			if err != nil {
				return fmt.Errorf("cannot read %s: %w", args[0], err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), struct {
					document
					imageView
				}{newDocument("hotpatch-image/1"), *v})
			}
			v.print(cmd.OutOrStdout())
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return c
}

func inspectRelease(w io.Writer, b []byte, asJSON bool) error {
	r, err := release.Open(b)
	if err != nil {
		return err
	}
	views := []*imageView{}
	for i, image := range r.Images {
		v, err := viewImage(image.File, r.ImageBytes(i))
		if err != nil {
			return fmt.Errorf("cannot read %s: %w", image.File, err)
		}
		views = append(views, v)
	}
	if asJSON {
		return printJSON(w, struct {
			document
			SHA256   string            `json:"sha256"`
			Manifest *release.Manifest `json:"manifest"`
			Images   []*imageView      `json:"images"`
		}{newDocument("hotpatch-contents/1"), r.SHA256, &r.Manifest, views})
	}
	fmt.Fprintf(w, "%s   %s of product %s, sequence %d\n\n", r.ID, r.Kind, r.Product, r.Sequence)
	row := func(name, format string, a ...any) {
		if s := fmt.Sprintf(format, a...); strings.Trim(s, " ,") != "" {
			fmt.Fprintf(w, "%-12s %s\n", name, s)
		}
	}
	row("Title", "%s", r.Title)
	row("Severity", "%s", r.Severity)
	row("Fixes", "%s", strings.Join(r.CVEs, " "))
	row("Month", "%s", r.Month)
	row("Baseline", "%s", r.Baseline)
	row("Needs", "%s", strings.Join(slices.Concat(r.Requires.OS, r.Requires.Arch, r.Requires.Features), " "))
	row("Consistency", "%s, unwind %s", r.Consistency, r.Unwind)
	row("SHA-256", "%s", r.SHA256)
	for i, v := range views {
		image := r.Images[i]
		fmt.Fprintf(w, "\nFor %s (%s), size %d, stamp %x, rsds %s\n", image.Name, image.Arch, image.Base.SizeOfImage, image.Base.TimeDateStamp, orNone(image.Base.RSDS))
		fmt.Fprintf(w, "    text %s\n\n", image.Base.TextSHA256)
		v.print(w)
	}
	printFiles(w, &r.Manifest)
	return nil
}

// imageView is what inspect tells of one PE image; its JSON keys are stable.
type imageView struct {
	File       string          `json:"file"`
	Identity   pe.Identity     `json:"identity"`
	DLL        bool            `json:"dll"`
	Name       string          `json:"name"` // of the export directory
	EntryPoint uint32          `json:"entry_point"`
	Sections   []sectionView   `json:"sections"`
	Exports    int             `json:"exports"`
	Imports    []string        `json:"imports"`
	LoadConfig *loadConfigView `json:"load_config"`
	HotPatch   *hotPatchView   `json:"hot_patch"`
}

type sectionView struct {
	Name string `json:"name"`
	RVA  uint32 `json:"rva"`
	Size uint32 `json:"size"`
	Prot string `json:"prot"`
}

type loadConfigView struct {
	RVA        uint32 `json:"rva"`
	Size       uint32 `json:"size"`
	GuardFlags uint32 `json:"guard_flags"`
	Functions  int    `json:"guard_functions"`
	Hybrid     bool   `json:"hybrid"`
	HotPatch   uint32 `json:"hot_patch_table"`
}

type hotPatchView struct {
	RVA         uint32         `json:"rva"`
	Version     uint32         `json:"version"`
	Size        uint32         `json:"size"`
	Sequence    uint32         `json:"sequence"`
	MinSequence uint32         `json:"min_sequence"`
	Flags       uint32         `json:"flags"`
	ExtraWords  uint32         `json:"extra_words"`
	Bases       []hotPatchBase `json:"bases"`
}

type hotPatchBase struct {
	Sequence  uint32       `json:"sequence"`
	Flags     uint32       `json:"flags"`
	TimeStamp uint32       `json:"time_stamp"`
	CheckSum  uint32       `json:"checksum"`
	SHA256    string       `json:"sha256,omitempty"`
	Records   []recordView `json:"records"`
}

type recordView struct {
	Type     string          `json:"type"`
	Inverse  bool            `json:"inverse"`
	Place    uint32          `json:"place"`
	Target   uint32          `json:"target"`
	Name     string          `json:"name,omitempty"` // symbol of the hotpatch image's side
	Original string          `json:"original,omitempty"`
	Length   uint32          `json:"length,omitempty"`
	SHA256   string          `json:"sha256,omitempty"`
	Ranges   []rangeView     `json:"ranges,omitempty"`
	Extra    []uint32        `json:"extra,omitempty"` // words of a table that is not ours
	at       pe.HotPatchType // for sorting out the sentence
}

type rangeView struct {
	RVA    uint32 `json:"rva"`
	Length uint32 `json:"length"`
	SHA256 string `json:"sha256"`
}

func viewImage(name string, b []byte) (*imageView, error) {
	im, err := pe.Parse(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, err
	}
	v := &imageView{File: fileName(name), DLL: im.Characteristics&0x2000 != 0, EntryPoint: im.EntryPoint} // IMAGE_FILE_DLL
	if v.Identity, err = im.Identity(); err != nil {
		return nil, err
	}
	if v.Name, err = im.ExportName(); err != nil {
		return nil, err
	}
	for _, s := range im.Sections {
		v.Sections = append(v.Sections, sectionView{s.Name, s.RVA, s.Extent(), protection(s)})
	}
	exports, err := im.Exports()
	if err != nil {
		return nil, err
	}
	v.Exports = len(exports)
	imports, err := im.Imports()
	if err != nil {
		return nil, err
	}
	names := map[uint32]string{} // by RVA
	v.Imports = []string{}
	for _, i := range imports {
		s := i.Name
		if s == "" {
			s = fmt.Sprintf("#%d", i.Ordinal)
		}
		s = i.DLL + "!" + s
		names[i.Slot] = s
		v.Imports = append(v.Imports, s)
	}
	symbols, err := im.Symbols()
	if err != nil {
		return nil, err
	}
	for _, s := range symbols {
		// Section names and the linker's marks ("__bss_start__") are no names of things.
		if strings.HasPrefix(s.Name, ".") || strings.HasSuffix(s.Name, "__") {
			continue
		}
		if names[s.RVA] == "" || s.Exported {
			names[s.RVA] = s.Name
		}
	}
	lc, err := im.LoadConfig()
	if err != nil {
		return nil, err
	}
	if lc != nil {
		v.LoadConfig = &loadConfigView{lc.RVA, lc.Size, lc.GuardFlags, len(lc.GuardFunctions), lc.CHPEMetadata != 0, lc.HotPatchTableOffset}
	}
	info, err := im.HotPatch()
	if err != nil || info == nil {
		return v, err
	}
	v.HotPatch, err = viewTable(info, names)
	return v, err
}

func viewTable(info *pe.HotPatchInfo, names map[uint32]string) (*hotPatchView, error) {
	t := &hotPatchView{RVA: info.RVA, Version: info.Version, Size: info.Size, Sequence: info.SequenceNumber,
		MinSequence: info.MinSequenceNumber, Flags: info.Flags, ExtraWords: info.ExtraPatchSize}
	for _, b := range info.Bases {
		base := hotPatchBase{Sequence: b.SequenceNumber, Flags: b.Flags, TimeStamp: b.OriginalTimeDateStamp,
			CheckSum: b.OriginalCheckSum, SHA256: hex.EncodeToString(b.SHA256), Records: []recordView{}}
		for _, r := range b.Records {
			v := recordView{Type: recordType(r.Type), Inverse: r.Inverse, Place: r.Place, Target: r.Target, Name: names[r.Target], at: r.Type}
			if r.Inverse {
				v.Name = names[r.Place]
			}
			ours := info.ExtraPatchSize == pe.FunctionExtraWords
			if ours && !r.Inverse && r.Type == pe.HotPatchFunction {
				x, err := info.Function(r)
				if err != nil {
					return nil, err
				}
				v.Original, v.Length, v.SHA256 = hex.EncodeToString(x.Original[:min(16, x.Length)]), x.Length, hex.EncodeToString(x.SHA256[:])
				for _, p := range x.Ranges {
					v.Ranges = append(v.Ranges, rangeView{p.RVA, p.Length, hex.EncodeToString(p.SHA256[:])})
				}
			} else if !ours {
				v.Extra = r.Extra
			}
			base.Records = append(base.Records, v)
		}
		t.Bases = append(t.Bases, base)
	}
	return t, nil
}

func recordType(t pe.HotPatchType) string {
	switch t {
	case pe.HotPatchFunction:
		return "function"
	case pe.HotPatchAbsolute:
		return "absolute"
	case pe.HotPatchREL32:
		return "rel32"
	case pe.HotPatchCallTarget:
		return "call-target"
	case pe.HotPatchIndirect:
		return "indirect"
	case pe.HotPatchNoCallTarget:
		return "no-call-target"
	case pe.HotPatchDynamicValue:
		return "dynamic-value"
	}
	return fmt.Sprintf("%#x", uint32(t))
}

func protection(s pe.Section) string {
	b := []byte("---")
	if s.Readable() {
		b[0] = 'r'
	}
	if s.Writable() {
		b[1] = 'w'
	}
	if s.Exec() {
		b[2] = 'x'
	}
	return string(b)
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func (v *imageView) print(w io.Writer) {
	kind := "program"
	if v.DLL {
		kind = "DLL"
	}
	if v.HotPatch != nil {
		kind = "hotpatch image"
	}
	id := v.Identity
	fmt.Fprintf(w, "%s   %s for %s, %d bytes in memory\n\n", v.File, kind, release.ArchOf(id.Machine), id.SizeOfImage)
	fmt.Fprintf(w, "%-12s stamp %x, checksum %x, rsds %s\n", "Identity", id.TimeDateStamp, id.CheckSum, orNone(id.RSDS))
	fmt.Fprintf(w, "%-12s text %s\n", "", id.TextSHA256)
	for i, s := range v.Sections {
		label := ""
		if i == 0 {
			label = "Sections"
		}
		fmt.Fprintf(w, "%-12s %-10s %s  at %6x, %8d bytes\n", label, s.Name, s.Prot, s.RVA, s.Size)
	}
	fmt.Fprintf(w, "%-12s %d\n", "Exports", v.Exports)
	fmt.Fprintf(w, "%-12s %s\n", "Imports", orNone(strings.Join(v.Imports, " ")))
	if lc := v.LoadConfig; lc == nil {
		fmt.Fprintf(w, "%-12s none\n", "Load config")
	} else {
		hybrid := ""
		if lc.Hybrid {
			hybrid = ", hybrid"
		}
		fmt.Fprintf(w, "%-12s at %x, %d bytes, guard flags %x, %s%s\n", "Load config", lc.RVA, lc.Size, lc.GuardFlags, plural(lc.Functions, "guarded function", "guarded functions"), hybrid)
	}
	t := v.HotPatch
	if t == nil {
		fmt.Fprintf(w, "%-12s none\n", "Hot patch")
		return
	}
	fmt.Fprintf(w, "%-12s table at %x, version %d, %d bytes, sequence %d, %s a record\n", "Hot patch", t.RVA, t.Version, t.Size, t.Sequence, plural(int(t.ExtraWords), "extra word", "extra words"))
	for _, b := range t.Bases {
		fmt.Fprintf(w, "%-12s stamp %x, checksum %x, flags %x\n", "Base", b.TimeStamp, b.CheckSum, b.Flags)
		for _, r := range b.Records {
			r.print(w)
		}
	}
}

// print writes one line a record: what is changed, and to what.
func (r recordView) print(w io.Writer) {
	label := r.Type
	if r.Inverse {
		label += " (inverse)"
	}
	var text string
	switch {
	case r.at == pe.HotPatchFunction && !r.Inverse:
		text = fmt.Sprintf("base %x leads to %x %s", r.Place, r.Target, r.Name)
		if r.Length > 0 {
			text += fmt.Sprintf("; was %d bytes, %s…, sha256 %.16s…", r.Length, r.Original, r.SHA256)
		}
	case r.at == pe.HotPatchFunction:
		text = fmt.Sprintf("%x %s leads back to base %x", r.Place, r.Name, r.Target)
	case r.at == pe.HotPatchAbsolute:
		text = fmt.Sprintf("%x := address of base %x  %s", r.Place, r.Target, r.Name)
	case r.at == pe.HotPatchIndirect:
		text = fmt.Sprintf("%x := what base %x holds  %s", r.Place, r.Target, r.Name)
	default:
		text = fmt.Sprintf("%x, %x", r.Place, r.Target)
	}
	fmt.Fprintf(w, "  %-20s %s\n", label, strings.TrimSpace(text))
	for _, p := range r.Ranges {
		fmt.Fprintf(w, "  %-20s and base %x, %d bytes, sha256 %.16s…\n", "", p.RVA, p.Length, p.SHA256)
	}
	for i := 0; i < len(r.Extra); i += 8 {
		fmt.Fprintf(w, "  %-20s extra %x\n", "", r.Extra[i:min(i+8, len(r.Extra))])
	}
}
