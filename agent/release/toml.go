package release

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"hotpatchd/pe"
)

// BaseFormat is the first word of the side file FILE.base.json that the image
// builder writes beside a hotpatch image: the image's own table holds stamp
// and checksum of the base only.
const BaseFormat = "hotpatch-base/1"

// BaseSuffix is what the side file's name adds to the hotpatch image's.
const BaseSuffix = ".base.json"

// Base is the side file: the identity of the base image, and what the builder
// found out about unwinding through the functions ("" if it did not look).
type Base struct {
	Format string `json:"format"`
	Unwind string `json:"unwind,omitempty"`
	pe.Identity
}

// ReadBase reads a side file, strictly.
func ReadBase(b []byte) (Base, error) {
	if len(b) > MaxManifest {
		return Base{}, fmt.Errorf("%d bytes, more than %d", len(b), MaxManifest)
	}
	var base Base
	if err := Decode(b, &base); err != nil {
		return Base{}, err
	}
	if base.Format != BaseFormat {
		return Base{}, fmt.Errorf("format is %q, not %q", clip(base.Format), BaseFormat)
	}
	if base.Unwind != "" && base.Unwind != UnwindNone && base.Unwind != UnwindRequired {
		return Base{}, fmt.Errorf("unwind is %q, not %q or %q", clip(base.Unwind), UnwindNone, UnwindRequired)
	}
	return base, CheckBase(base.Identity)
}

// FromTOML reads release.toml and the files it names in dir, and returns the
// manifest with everything filled in that follows from them, and the contents
// by entry name, ready for Write. An image needs name and file; a whole file
// needs destination and file, and replaces unless it is new: hashes, or the older
// files themselves. All files are named relative to dir.
func FromTOML(b []byte, dir fs.FS) (*Manifest, map[string][]byte, error) {
	m := new(Manifest)
	if len(b) > MaxManifest {
		return nil, nil, fmt.Errorf("%d bytes, more than %d", len(b), MaxManifest)
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(m); err != nil {
		return nil, nil, tomlError(err)
	}
	if m.Format == "" {
		m.Format = Format
	}
	if m.Kind == "" {
		m.Kind = KindHotpatch
	}
	if n := len(m.Images) + len(m.Files); n > MaxImages {
		return nil, nil, fmt.Errorf("%d images or files, more than %d", n, MaxImages)
	}
	files := map[string][]byte{}
	word := "" // the strictest word of the side files on unwinding
	for i := range m.Images {
		unwind, err := m.Images[i].load(dir, i, files)
		if err != nil {
			return nil, nil, fmt.Errorf("images[%d]: %w", i, err)
		}
		if unwind == UnwindRequired || word == "" {
			word = unwind
		}
	}
	if m.Unwind == "" {
		m.Unwind = word
	}
	for i := range m.Files {
		if err := m.Files[i].load(dir, i, files); err != nil {
			return nil, nil, fmt.Errorf("files[%d]: %w", i, err)
		}
	}
	m.fill()
	if err := m.normalize(); err != nil {
		return nil, nil, err
	}
	return m, files, m.Check()
}

// load reads the hotpatch image and its side file, fills what was left out and
// refuses what was given but is wrong. It returns the side file's word on unwinding.
func (i *Image) load(dir fs.FS, n int, files map[string][]byte) (string, error) {
	source := i.File
	content, err := readFile(dir, source, MaxImage)
	if err != nil {
		return "", err
	}
	t, err := readTable(content)
	if err != nil {
		return "", fmt.Errorf("%s: %w", source, err)
	}
	if i.Arch == "" {
		i.Arch = t.arch
	}
	if i.Name == "" {
		return "", errors.New("name is missing: the file name of the base image")
	}
	side, sideErr := loadBase(dir, source+BaseSuffix)
	if i.Base == (pe.Identity{}) {
		if sideErr != nil {
			return "", fmt.Errorf("base is not given and cannot be taken from the side file: %w", sideErr)
		}
		i.Base = side.Identity
	} else if sideErr != nil && !errors.Is(sideErr, fs.ErrNotExist) {
		return "", sideErr
	}
	if err := t.agrees(i, source); err != nil {
		return "", err
	}
	ext := path.Ext(i.Name)
	i.File = fmt.Sprintf("images/%s-%d%s", plainName(strings.TrimSuffix(i.Name, ext)), n+1, plainName(ext))
	files[i.File] = content
	return side.Unwind, fill(content, &i.Size, &i.SHA256)
}

func (f *File) load(dir fs.FS, n int, files map[string][]byte) error {
	content, err := readFile(dir, f.File, MaxFile)
	if err != nil {
		return err
	}
	for i, old := range f.Replaces {
		if sha256Pattern.MatchString(old) {
			continue
		}
		b, err := readFile(dir, old, MaxFile)
		if err != nil {
			return fmt.Errorf("replaces[%d]: %w", i, err)
		}
		sum := sha256.Sum256(b)
		f.Replaces[i] = hex.EncodeToString(sum[:])
	}
	if id, ok := identityOf(content); f.Identity == nil && ok {
		f.Identity = &id
	} else if f.Identity != nil && (!ok || *f.Identity != id) {
		return fmt.Errorf("identity is not that of %s", f.File)
	}
	f.File = fmt.Sprintf("files/%d-%s", n+1, plainName(path.Base(strings.ReplaceAll(f.File, `\`, "/"))))
	files[f.File] = content
	return fill(content, &f.Size, &f.SHA256)
}

// identityOf is the identity of a PE image that processes of this daemon's kind
// can have mapped; false for any other file.
func identityOf(content []byte) (pe.Identity, bool) {
	im, err := pe.Parse(bytes.NewReader(content), int64(len(content)))
	if err != nil {
		return pe.Identity{}, false
	}
	id, err := im.Identity()
	return id, err == nil && ArchOf(id.Machine) != "" && CheckBase(id) == nil
}

func loadBase(dir fs.FS, name string) (Base, error) {
	b, err := readFile(dir, name, MaxManifest)
	if err != nil {
		return Base{}, err
	}
	base, err := ReadBase(b)
	if err != nil {
		return Base{}, fmt.Errorf("%s: %w", name, err)
	}
	return base, nil
}

func readFile(dir fs.FS, name string, limit int64) ([]byte, error) {
	if name == "" {
		return nil, errors.New("file is missing")
	}
	info, err := fs.Stat(dir, name)
	if err != nil {
		return nil, fmt.Errorf("cannot read: %w", err)
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", name, info.Size(), limit)
	}
	b, err := fs.ReadFile(dir, name)
	if err != nil {
		return nil, fmt.Errorf("cannot read: %w", err)
	}
	return b, nil
}

// fill sets size and hash, or compares them where the author gave them.
func fill(content []byte, size *int64, sum *string) error {
	h := sha256.Sum256(content)
	actual := hex.EncodeToString(h[:])
	if *size != 0 && *size != int64(len(content)) {
		return fmt.Errorf("size is %d, but the file has %d bytes", *size, len(content))
	}
	if *sum != "" && *sum != actual {
		return fmt.Errorf("sha256 is %s, but the file's is %s", clip(*sum), actual)
	}
	*size, *sum = int64(len(content)), actual
	return nil
}

// plainName replaces what an entry of the container may not have.
func plainName(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '.' || entryPattern.MatchString("x"+string(r)) {
			return r
		}
		return '_'
	}, s)
}

// normalize gives info the types it has when it is read back from JSON.
func (m *Manifest) normalize() error {
	b, err := json.Marshal(m.Info)
	if err != nil {
		return fmt.Errorf("info cannot be written as JSON: %w", err)
	}
	m.Info = nil
	return json.Unmarshal(b, &m.Info)
}

// tomlError tells where and what, in one line and in words of the format.
func tomlError(err error) error {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) && len(unknown.Errors) > 0 {
		row, column := unknown.Errors[0].Position()
		return fmt.Errorf("line %d, column %d: there is no field %q", row, column, strings.Join(unknown.Errors[0].Key(), "."))
	}
	var bad *toml.DecodeError
	if !errors.As(err, &bad) {
		return err
	}
	row, column := bad.Position()
	text := strings.TrimPrefix(bad.Error(), "toml: ")
	key := strings.Join(bad.Key(), ".")
	if rest, ok := strings.CutPrefix(text, "cannot decode TOML "); ok && key != "" {
		is, rest, _ := strings.Cut(rest, " into ")
		_, wanted, _ := strings.Cut(rest, " of type ")
		text = fmt.Sprintf("%s cannot be of type %s, wanted %s", key, is, tomlWord(wanted))
	} else if value, wanted, ok := strings.Cut(text, " cannot be stored in "); ok && key != "" {
		text = fmt.Sprintf("%s: %s, wanted %s", key, value, tomlWord(wanted))
	}
	return fmt.Errorf("line %d, column %d: %s", row, column, text)
}

// tomlWord is what an author calls a type of Go.
func tomlWord(t string) string {
	switch t {
	case "string":
		return `text in quotation marks`
	case "[]string":
		return `a list of texts: ["…", "…"]`
	case "uint16":
		return "a number from 0 to 65535"
	case "uint32":
		return "a number from 0 to 4294967295"
	case "int64", "uint64":
		return "a whole number, not negative"
	case "[]release.Image", "release.Image":
		return "tables that begin with [[images]]"
	case "[]release.File", "release.File":
		return "tables that begin with [[files]]"
	}
	return "a table"
}
