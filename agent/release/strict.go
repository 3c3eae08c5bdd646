package release

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"unicode/utf8"
)

// maxDepth bounds nesting of a document; ours need four levels, info a few more.
const maxDepth = 16

// UnknownField is the error for a field the document's format does not have.
type UnknownField struct{ Field string }

func (e *UnknownField) Error() string {
	return fmt.Sprintf("has the field %q: this daemon does not know it; newer daemons may", e.Field)
}

// Decode reads one JSON document into the struct v points to, more strictly
// than encoding/json: field names match to the letter, occur once, are all
// known (UnknownField), null stands for nothing, text is UTF-8, and nothing
// follows the document. Two readers can never see two things in one document.
func Decode(b []byte, v any) error {
	if !utf8.Valid(b) {
		return errors.New("text is not UTF-8")
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := walk(dec, reflect.TypeOf(v).Elem(), "", 0); err != nil {
		return err
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("something follows the document at byte %d", dec.InputOffset())
	}
	err := json.Unmarshal(b, v)
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		return fmt.Errorf("field %q cannot be a %s", wrong.Field, wrong.Value)
	}
	return err
}

// walk reads one value and compares its fields with those of t. A nil t, and
// types that read themselves, take anything.
func walk(dec *json.Decoder, t reflect.Type, path string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("field %q is nested deeper than %d", path, maxDepth)
	}
	token, err := next(dec)
	if err != nil {
		return err
	}
	switch token {
	case nil:
		return fmt.Errorf("field %q is null", path)
	case json.Delim('{'):
		return walkObject(dec, t, path, depth)
	case json.Delim('['):
		var elem reflect.Type
		if t != nil && t.Kind() == reflect.Slice {
			elem = t.Elem()
		}
		for i := 0; dec.More(); i++ {
			if err := walk(dec, elem, fmt.Sprintf("%s[%d]", path, i), depth+1); err != nil {
				return err
			}
		}
		_, err := next(dec)
		return err
	}
	return nil
}

// next is the next token of a document that must not end yet.
func next(dec *json.Decoder) (json.Token, error) {
	token, err := dec.Token()
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("at byte %d: %w", dec.InputOffset(), err)
	}
	return token, nil
}

func walkObject(dec *json.Decoder, t reflect.Type, path string, depth int) error {
	var known map[string]reflect.Type
	if t != nil && t.Kind() == reflect.Struct && !reflect.PointerTo(t).Implements(unmarshaler) {
		known = fields(t)
	}
	seen := map[string]bool{}
	for dec.More() {
		token, err := next(dec)
		if err != nil {
			return err
		}
		key, _ := token.(string)
		at := key
		if path != "" {
			at = path + "." + key
		}
		if len(at) > MaxTitle {
			return fmt.Errorf("a field name at byte %d is longer than %d", dec.InputOffset(), MaxTitle)
		}
		if seen[key] {
			return fmt.Errorf("field %q occurs twice", at)
		}
		seen[key] = true
		var child reflect.Type
		if known != nil {
			var ok bool
			if child, ok = known[key]; !ok {
				return &UnknownField{Field: at}
			}
		}
		if err := walk(dec, child, at, depth+1); err != nil {
			return err
		}
	}
	_, err := next(dec)
	return err
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

// fields maps the JSON names of struct t to their types, embedded structs flattened.
func fields(t reflect.Type) map[string]reflect.Type {
	m := map[string]reflect.Type{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && name == "" {
			for k, v := range fields(f.Type) {
				m[k] = v
			}
			continue
		}
		if name == "" || name == "-" {
			continue
		}
		ft := f.Type
		if ft.Kind() == reflect.Pointer {
			ft = ft.Elem()
		}
		m[name] = ft
	}
	return m
}

// peek reads id and format for error sentences only; both may be anything.
func peek(b []byte) (id, format string) {
	var head struct {
		ID     string `json:"id"`
		Format string `json:"format"`
	}
	_ = json.Unmarshal(b, &head) // a document that does not parse is reported by Decode
	if !ValidID(head.ID) {
		return "this release", clip(head.Format)
	}
	return "release " + head.ID, clip(head.Format)
}

// clip keeps hostile text out of error sentences beyond a few words.
func clip(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
