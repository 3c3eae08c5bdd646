package agent

import (
	"context"
	"fmt"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"hotpatchd/agent/control"
)

// Management is where device management has its say: on Windows the registry.
// Every key of the configuration and of the policy can be set there by its name
// as in the file, a key of a table as "table.key" ("repository.url"). What is
// set there wins over the files. There is no "format".
type Management interface {
	// Source names the place: `HKLM\SOFTWARE\Policies\hotpatchd`.
	Source() string
	// Settings are what is set now, in any order; none is no error.
	Settings() ([]Setting, error)
	// Watch calls onChange, from the calling goroutine, when the settings have
	// changed, until ctx ends. A call too many is harmless.
	Watch(ctx context.Context, onChange func())
}

// Setting is one value as it is stored.
type Setting struct {
	Name string
	Type string // of the registry: REG_SZ, REG_DWORD, REG_MULTI_SZ or another
	// Value is a string, a uint32 or a []string, by Type; nil for another type.
	Value any
}

// maxSettings bounds what is read of device management; there are not forty keys.
const maxSettings = 200

// settings is what device management has set, read once.
type settings struct {
	source string
	all    []Setting
}

// managedBy reads the settings; m may be nil.
func managedBy(m Management) (settings, error) {
	if m == nil {
		return settings{}, nil
	}
	all, err := m.Settings()
	if err != nil {
		return settings{}, err
	}
	s := settings{source: m.Source(), all: all}
	if len(all) > maxSettings {
		return settings{}, fmt.Errorf("%s: has %d values, at most %d are read", s.source, len(all), maxSettings)
	}
	for _, one := range all {
		if _, policy := leaf(reflect.ValueOf(&policyFile{}), one.Name); policy {
			continue
		}
		if _, config := leaf(reflect.ValueOf(&configFile{}), one.Name); !config {
			return settings{}, fmt.Errorf("%s, %s: no such key", s.source, visible(clipped(one.Name)))
		}
	}
	return s, nil
}

// of are the settings that belong to a file of this type.
func (s settings) of(file any) settings {
	out := settings{source: s.source}
	for _, one := range s.all {
		if _, ok := leaf(reflect.ValueOf(file), one.Name); ok {
			out.all = append(out.all, one)
		}
	}
	slices.SortFunc(out.all, func(a, b Setting) int { return strings.Compare(strings.ToLower(a.Name), strings.ToLower(b.Name)) })
	return out
}

func clipped(s string) string {
	const most = 80
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// leaf finds the field of a key in the struct that a file is decoded into.
// Names in the registry have no case.
func leaf(v reflect.Value, key string) (reflect.Value, bool) {
	v = reflect.Indirect(v)
	name, rest, inner := strings.Cut(key, ".")
	for i := range v.NumField() {
		tag := v.Type().Field(i).Tag.Get("toml")
		if !strings.EqualFold(tag, name) || tag == "format" || inner != (v.Field(i).Kind() == reflect.Struct) {
			continue
		}
		if inner {
			return leaf(v.Field(i), rest)
		}
		return v.Field(i), true
	}
	return reflect.Value{}, false
}

// keys are all keys of such a struct, in its order.
func keys(t reflect.Type, table string) []string {
	var all []string
	for i := range t.NumField() {
		key := table + t.Field(i).Tag.Get("toml")
		switch {
		case key == "format":
		case t.Field(i).Type.Kind() == reflect.Struct:
			all = append(all, keys(t.Field(i).Type, key+".")...)
		default:
			all = append(all, key)
		}
	}
	return all
}

// overlay puts settings over what the file said, typed strictly, and notes them,
// so that errors about their values name their place.
func (d *document) overlay(into any, s settings) error {
	d.managed = map[string]string{}
	for _, one := range s.all {
		field, _ := leaf(reflect.ValueOf(into), one.Name)
		key := canonical(into, one.Name)
		place := s.source + ", " + key
		d.managed[key] = place
		kind := field.Type()
		if kind.Kind() == reflect.Pointer {
			kind = kind.Elem()
		}
		var want string
		value := reflect.New(kind).Elem()
		switch kind.Kind() {
		case reflect.Bool:
			n, ok := one.Value.(uint32)
			if want = "REG_DWORD"; ok && n > 1 {
				return fmt.Errorf("%s: must be 0 or 1, not %d", place, n)
			} else if ok {
				want = ""
			}
			value.SetBool(n == 1)
		case reflect.Int:
			n, ok := one.Value.(uint32)
			if want = "REG_DWORD"; ok {
				want = ""
			}
			value.SetInt(int64(n))
		case reflect.String:
			text, ok := one.Value.(string)
			if want = "REG_SZ"; ok {
				want = ""
			}
			value.SetString(text)
		default:
			list, ok := one.Value.([]string)
			if want = "REG_MULTI_SZ"; ok {
				want = ""
			}
			value.Set(reflect.ValueOf(slices.Clone(list)))
		}
		if want != "" {
			return fmt.Errorf("%s: must be %s, not %s", place, want, one.Type)
		}
		if field.Kind() == reflect.Pointer {
			field.Set(value.Addr())
		} else {
			field.Set(value)
		}
	}
	return nil
}

// canonical is a key as the file spells it.
func canonical(file any, name string) string {
	for _, k := range keys(reflect.TypeOf(file).Elem(), "") {
		if strings.EqualFold(k, name) {
			return k
		}
	}
	return name
}

// set tells whether a key was said, in the file or by device management.
func (d *document) set(key string) bool {
	_, inFile := d.at[key]
	_, managed := d.managed[key]
	return inFile || managed
}

// effective lists every key of a file with the value in force and where it
// comes from. defaults words values that are not set; in is what was read.
func (d *document) effective(in any, defaults map[string]string) []control.Setting {
	var all []control.Setting
	for _, key := range keys(reflect.TypeOf(in).Elem(), "") {
		field, _ := leaf(reflect.ValueOf(in), key)
		s := control.Setting{Key: key, Source: "default"}
		place, managed := d.managed[key]
		where, inFile := d.at[key]
		switch {
		case managed:
			s.Source = place
		case inFile:
			row, _ := d.place(where)
			s.Source = d.file + ":" + strconv.Itoa(row)
		}
		s.Value = written(field)
		if u, err := url.Parse(field.String()); field.Kind() == reflect.String && err == nil && u.User != nil {
			s.Value = strconv.Quote(u.Redacted()) // a proxy's password is for nobody's screen
		}
		if word, ok := defaults[key]; ok && !managed && !inFile {
			s.Value = word
		}
		all = append(all, s)
	}
	return all
}

// written is a value as it would stand in the file.
func written(v reflect.Value) string {
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return ""
		}
		v = v.Elem()
	}
	switch v.Kind() {
	case reflect.Bool:
		return strconv.FormatBool(v.Bool())
	case reflect.Int:
		return strconv.FormatInt(v.Int(), 10)
	case reflect.String:
		return strconv.Quote(v.String())
	}
	var list []string
	for i := range v.Len() {
		list = append(list, strconv.Quote(v.Index(i).String()))
	}
	return "[" + strings.Join(list, ", ") + "]"
}

// policyPlace is where the owner's word on eligibility is to be found.
func (a *Agent) policyPlace() string {
	for _, s := range a.shownPolicy {
		if strings.HasSuffix(s.Source, ", "+s.Key) && (s.Key == "enrolled" || s.Key == "allow_hotpatch") {
			return a.o.Config.Policy.File + " and " + a.o.Management.Source()
		}
	}
	return a.o.Config.Policy.File
}

// policyFault is what must be mended after policyErr: the file, or the value
// that device management has set.
func (a *Agent) policyFault() string {
	if a.o.Management != nil && strings.HasPrefix(a.policyErr.Error(), a.o.Management.Source()) {
		return a.policyErr.Error()
	}
	return a.o.Config.Policy.File
}

// watchManagement wakes the loop when device management has changed something.
func (a *Agent) watchManagement(ctx context.Context) {
	if a.o.Management != nil {
		a.o.Management.Watch(ctx, a.Reload)
	}
}

// noticeConfiguration says that the configuration was changed by device
// management since the start: it is read at the start only.
func (a *Agent) noticeConfiguration() {
	if a.o.Management == nil {
		return
	}
	s, err := managedBy(a.o.Management)
	if err != nil {
		return // said as the policy's error
	}
	now := s.of(&configFile{})
	if a.managedAtStart == nil {
		a.managedAtStart = &now
		return
	}
	if !reflect.DeepEqual(now, *a.managedAtStart) {
		a.notice("configuration-managed", control.SeverityWarning,
			"device management has changed the configuration; it takes effect when the service is restarted", now.source)
	}
}

// maxSettingText bounds what the history keeps of one value, bytes: lists of a
// thousand entries are in the file.
const maxSettingText = 120

// changedSettings tells which settings differ, and what they are now; "" if none
// does: words between the settings may have changed, or where they come from.
func changedSettings(was, is []control.Setting) string {
	var out []string
	for _, s := range is {
		i := slices.IndexFunc(was, func(w control.Setting) bool { return w.Key == s.Key })
		if i >= 0 && was[i].Value == s.Value {
			continue
		}
		value := s.Value
		if len(value) > maxSettingText {
			value = strings.ToValidUTF8(value[:maxSettingText], "") + "…"
		}
		out = append(out, s.Key+" = "+value)
	}
	if len(out) == 0 {
		return ""
	}
	return ": " + strings.Join(out, ", ")
}

// Policy answers with every setting of policy and configuration, and where each comes from.
func (a *Agent) Policy(ctx context.Context, _ control.Caller) (*control.Settings, error) {
	var out *control.Settings
	err := a.call(ctx, func() {
		out = &control.Settings{Policy: slices.Clone(a.shownPolicy), Configuration: slices.Clone(a.o.Settings)}
		if a.policyErr != nil {
			out.Problem = a.policyErr.Error()
		}
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}
