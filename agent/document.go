package agent

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"

	"hotpatchd/agent/regular"
)

// maxDocument bounds a configuration or policy file, in bytes. Ours are below
// 4 KiB; a policy with a thousand rules stays below 100.
const maxDocument = 1 << 20

// maxRoot bounds root.json, in bytes, as the repository's client does.
const maxRoot = 512 << 10

// document is a TOML file, read strictly, that remembers where each key stands,
// so that what is wrong with a value can be shown in the file, whoever finds it.
type document struct {
	file string
	text []byte
	at   map[string]unstable.Range // "repository.url", "deny[2]" → its value

	managed map[string]string // keys that device management has set → where
}

// readDocument reads a configuration or policy file.
func readDocument(file string) ([]byte, error) { return regular.Read(file, maxDocument) }

// ReadRoot reads a root of trust, root.json.
func ReadRoot(file string) ([]byte, error) { return regular.Read(file, maxRoot) }

// decode fills into from text. The format is looked at first: a document for a
// newer daemon is named as such, not by the first key that is new in it.
func decode(file string, text []byte, format string, into any) (*document, error) {
	d := &document{file: file, text: text, at: map[string]unstable.Range{}}
	var head struct {
		Format string `toml:"format"`
	}
	if err := toml.Unmarshal(text, &head); err != nil {
		return nil, d.drawn(err, &head)
	}
	d.index()
	switch head.Format {
	case format:
	case "":
		return nil, d.show(0, 0, "format is missing; the first line should be: format = %q", format)
	default:
		return nil, d.errorf("format", "this daemon reads %q, not %q; newer daemons may", format, head.Format)
	}
	if err := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields().Decode(into); err != nil {
		return nil, d.drawn(err, into)
	}
	return d, nil
}

// drawn says in our words what the parser found, with file, line, column and
// the line itself. Of several unknown keys the first is shown, the others
// counted. into is what was decoded into: it tells what a key wants.
func (d *document) drawn(err error, into any) error {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) && len(missing.Errors) > 0 {
		first := missing.Errors[0]
		row, column := first.Position()
		message := keyName(strings.Join(first.Key(), ".")) + ": no such key"
		if more := len(missing.Errors) - 1; more > 0 {
			message += fmt.Sprintf(" (and %d more)", more)
		}
		return d.show(row, column, "%s", message)
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, column := bad.Position()
		key := strings.Join(bad.Key(), ".")
		// Of an inline table the parser names the table only.
		for inner, where := range d.at {
			if r, c := d.place(where); r == row && c == column && strings.HasPrefix(inner, key+".") && !strings.Contains(inner, "[") {
				key = inner
			}
		}
		message := inWords(strings.TrimPrefix(bad.Error(), "toml: "), wanted(reflect.TypeOf(into), strings.Split(key, ".")))
		if where, ok := d.at[key]; ok && row == 1 && column == 1 { // the parser does not always know the place
			row, column = d.place(where)
		}
		if key != "" {
			message = keyName(key) + ": " + message
		}
		return d.show(row, column, "%s", message)
	}
	return fmt.Errorf("%s: %w", d.file, err)
}

// inWords is the parser's message as an administrator reads it: without our Go
// types, and with what is expected. want is "" where that is not known.
func inWords(message, want string) string {
	kind, _, mismatch := strings.Cut(strings.TrimPrefix(message, "cannot decode TOML "), " into ")
	switch {
	case mismatch && want != "" && kind != "":
		article := "a "
		if strings.ContainsRune("aeiou", rune(kind[0])) {
			article = "an "
		}
		return "must be " + want + ", not " + article + kind
	case mismatch:
		return "a wrong kind of value: " + kind
	case strings.Contains(message, "too large to fit"):
		return "the number is too large"
	case strings.Contains(message, "at start of value"):
		return `not TOML: a value must stand here: text in quotes, a number, true, false, or a list in [ ]`
	case strings.HasPrefix(message, "expected keyword"):
		return "not TOML: true or false is misspelt here; text stands in quotes"
	case strings.HasSuffix(message, "is already defined"):
		return "stands here for the second time"
	}
	return "not TOML: " + message
}

// wanted says what kind of value the key of a struct wants.
func wanted(t reflect.Type, key []string) string {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch {
	case t == nil:
		return ""
	case len(key) > 0 && key[0] != "" && t.Kind() == reflect.Struct:
		for i := range t.NumField() {
			if t.Field(i).Tag.Get("toml") == key[0] {
				return wanted(t.Field(i).Type, key[1:])
			}
		}
		return ""
	}
	switch t.Kind() {
	case reflect.String:
		return `text in quotes, such as "a"`
	case reflect.Bool:
		return "true or false"
	case reflect.Int:
		return "a whole number"
	case reflect.Slice:
		return `a list of texts, such as ["a", "b"]`
	case reflect.Struct:
		return "a table with keys of its own"
	}
	return ""
}

// place is row and column, from 1, of a value.
func (d *document) place(where unstable.Range) (row, column int) {
	before := d.text[:where.Offset]
	return bytes.Count(before, []byte("\n")) + 1, len(before) - (bytes.LastIndexByte(before, '\n') + 1) + 1
}

// index notes where every value stands. The text has been parsed before, so
// that nothing here can fail.
func (d *document) index() {
	p := unstable.Parser{}
	p.Reset(d.text)
	table := ""
	for p.NextExpression() {
		node := p.Expression()
		switch node.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = keyOf(node)
		case unstable.KeyValue:
			d.note(table, node)
		}
	}
}

// note notes a key's value, and what is inside it. Arrays and inline tables have
// no place of their own: they stand where their key does.
func (d *document) note(table string, pair *unstable.Node) {
	key := keyOf(pair)
	if table != "" {
		key = table + "." + key
	}
	it := pair.Key()
	it.Next()
	d.noteValue(key, pair.Value(), it.Node().Raw)
}

func (d *document) noteValue(key string, value *unstable.Node, outer unstable.Range) {
	where := value.Raw
	if where.Length == 0 {
		where = outer
	}
	d.at[key] = where
	for i, it := 0, value.Children(); it.Next(); {
		if child := it.Node(); child.Kind == unstable.KeyValue {
			d.note(key, child)
		} else {
			d.noteValue(fmt.Sprintf("%s[%d]", key, i), child, where)
			i++
		}
	}
}

func keyOf(n *unstable.Node) string {
	var parts []string
	for it := n.Key(); it.Next(); {
		parts = append(parts, string(it.Node().Data))
	}
	return strings.Join(parts, ".")
}

// keyName writes a key as people know it from the file: "[repository] url".
func keyName(key string) string {
	table, name, ok := strings.Cut(key, ".")
	if !ok {
		return key
	}
	return "[" + table + "] " + name
}

// errorf is an error about the value of key, shown where it stands. A key that
// is not in the file (a default that does not fit the rest) is only named.
func (d *document) errorf(key, format string, args ...any) error {
	base, _, _ := strings.Cut(key, "[")
	if place, ok := d.managed[base]; ok {
		return fmt.Errorf("%s%s: %s", place, key[len(base):], visible(fmt.Sprintf(format, args...)))
	}
	message := keyName(key) + ": " + fmt.Sprintf(format, args...)
	where, ok := d.at[key]
	if !ok {
		return d.show(0, 0, "%s", message)
	}
	row, column := d.place(where)
	return d.show(row, column, "%s", message)
}

// excerpt bounds the length of the line that is drawn, in bytes.
const excerpt = 160

// show is an error with its place; row and column count from 1 (bytes), 0 = no place.
func (d *document) show(row, column int, format string, args ...any) error {
	message := visible(fmt.Sprintf(format, args...)) // keys and values come from the file
	if row == 0 {
		return fmt.Errorf("%s: %s", d.file, message)
	}
	line := ""
	if lines := bytes.Split(d.text, []byte("\n")); row <= len(lines) {
		line = strings.TrimRight(string(lines[row-1]), "\r")
	}
	head := fmt.Sprintf("%s:%d:%d: %s", d.file, row, column, message)
	if column-1 > len(line) || column > excerpt {
		return errors.New(head)
	}
	if len(line) > excerpt {
		line = strings.ToValidUTF8(line[:excerpt], "") + "…"
	}
	number := strconv.Itoa(row)
	blank := strings.Repeat(" ", len(number))
	lead := strings.Repeat(" ", utf8.RuneCountInString(line[:min(column-1, len(line))]))
	return fmt.Errorf("%s\n  %s | %s\n  %s | %s^", head, number, visible(line), blank, lead)
}

// visible keeps a line on its line: control characters become blanks.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// duration parses the value of key, which must lie in min..max; "" is the default.
func (d *document) duration(key, text string, fallback, least, most time.Duration) (time.Duration, error) {
	if !d.set(key) {
		return fallback, nil
	}
	v, err := time.ParseDuration(text)
	if err != nil {
		return 0, d.errorf(key, "%q is not a duration such as \"90s\", \"5m\" or \"1h30m\"", text)
	}
	if v < least || v > most {
		return 0, d.errorf(key, "%s is not between %s and %s", text, least, most)
	}
	return v, nil
}

// oneOf checks a word.
func (d *document) oneOf(key, word string, words ...string) error {
	for _, w := range words {
		if w == word {
			return nil
		}
	}
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = strconv.Quote(w)
	}
	return d.errorf(key, "%q is none of %s", word, strings.Join(quoted, ", "))
}
