package control

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"time"
)

// formatOf is the format name of a document, "" for what is none.
func formatOf(doc any) string {
	switch doc.(type) {
	case *Status:
		return FormatStatus
	case *Eligibility:
		return FormatEligibility
	case *Report:
		return FormatReport
	case *Offers:
		return FormatOffers
	case *Calendar:
		return FormatCalendar
	case *Processes:
		return FormatProcesses
	case *Plan:
		return FormatPlan
	case *Change:
		return FormatChange
	case *Verify:
		return FormatVerify
	case *History:
		return FormatHistory
	case *Explain:
		return FormatExplain
	case *Settings:
		return FormatSettings
	case *Event:
		return FormatEvent
	case *errorDoc:
		return FormatError
	}
	return ""
}

// errorDoc carries an Error.
type errorDoc struct {
	Header
	Error *Error `json:"error"`
}

func (h *Header) header() *Header { return h }

// encode makes the bytes of a document. It does not touch the document, which
// other callers may be reading.
func encode(doc any, version string, now time.Time) ([]byte, error) {
	format := formatOf(doc)
	if format == "" {
		return nil, fmt.Errorf("a %T is no document", doc)
	}
	v := reflect.New(reflect.TypeOf(doc).Elem())
	v.Elem().Set(whole(reflect.ValueOf(doc).Elem()))
	h := v.Interface().(interface{ header() *Header }).header()
	h.Format = format
	if h.Generated.IsZero() {
		h.Generated = At(now)
	}
	if h.Version == "" {
		h.Version = version
	}
	b, err := json.Marshal(v.Interface())
	return append(b, '\n'), err
}

// whole copies a value so that every list in it is a list: consumers find [], never null.
func whole(v reflect.Value) reflect.Value {
	switch v.Kind() {
	case reflect.Slice:
		out := reflect.MakeSlice(v.Type(), v.Len(), v.Len())
		for i := range v.Len() {
			out.Index(i).Set(whole(v.Index(i)))
		}
		return out
	case reflect.Pointer:
		if v.IsNil() {
			return v
		}
		out := reflect.New(v.Type().Elem())
		out.Elem().Set(whole(v.Elem()))
		return out
	case reflect.Struct:
		out := reflect.New(v.Type()).Elem()
		out.Set(v)
		if v.Type() == reflect.TypeFor[Time]() {
			return out
		}
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				out.Field(i).Set(whole(v.Field(i)))
			}
		}
		return out
	}
	return v
}

// decodeStrict reads one JSON document without unknown keys and with nothing after it.
func decodeStrict(r io.Reader, into any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is more after the document")
	}
	return nil
}

// decodeDoc reads a document of the daemon; unknown keys are passed over.
func decodeDoc(b []byte, into any) error {
	if err := json.NewDecoder(bytes.NewReader(b)).Decode(into); err != nil {
		return err
	}
	h := into.(interface{ header() *Header }).header()
	if want := formatOf(into); h.Format != want {
		return fmt.Errorf("the daemon answers with format %q, this command knows %q", h.Format, want)
	}
	return nil
}
