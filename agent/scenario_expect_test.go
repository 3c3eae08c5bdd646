package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"hotpatchd/agent/control"
)

// Expectations read documents as any client does, as JSON, so that their keys
// are tested too. KEY=VALUE compares a key's text, KEY=~WORDS looks for words in it.

// fields is a document by its JSON keys.
func fields(doc any) map[string]any {
	b, err := json.Marshal(doc)
	if err != nil {
		return map[string]any{"error": err.Error()}
	}
	var out map[string]any
	if err := json.Unmarshal(b, &out); err != nil {
		return map[string]any{"error": err.Error()}
	}
	return out
}

// text is how a JSON value is written in a script: null and "" as nothing.
func text(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case []any:
		var list []string
		for _, x := range v {
			list = append(list, text(x))
		}
		return strings.Join(list, ",")
	}
	return fmt.Sprint(v)
}

// differ tells which of the wanted keys are otherwise, "" if none.
func differ(found map[string]any, want []string) string {
	var out []string
	for _, w := range want {
		key, value, ok := strings.Cut(w, "=")
		if !ok {
			return fmt.Sprintf("%q is not KEY=VALUE", w)
		}
		var v any = found
		for _, part := range strings.Split(key, ".") {
			m, _ := v.(map[string]any)
			if m == nil {
				v = nil
				break
			}
			if v, ok = m[part]; !ok {
				return fmt.Sprintf("there is no key %q", key)
			}
		}
		have := text(v)
		if words, ok := strings.CutPrefix(value, "~"); ok && strings.Contains(have, words) || have == value {
			continue
		}
		out = append(out, fmt.Sprintf("%s is %q, wanted %q", key, have, value))
	}
	return strings.Join(out, "; ")
}

func (s *script) statusNow() (map[string]any, error) {
	var doc *control.Status
	err := s.ask(func(ctx context.Context, c *control.Client) (err error) {
		doc, err = c.Status(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	return fields(doc), nil
}

// wantStatus: nested keys are joined by dots: release.id=R1.
func (s *script) wantStatus(want []string) error {
	return s.until(func() string {
		doc, err := s.statusNow()
		if err != nil {
			return err.Error()
		}
		for _, key := range []string{"release", "repository"} { // null is not "no such key"
			if doc[key] == nil {
				doc[key] = map[string]any{"id": "", "error": ""}
			}
		}
		return differ(doc, want)
	})
}

func (s *script) processesNow() (*control.Processes, error) {
	var doc *control.Processes
	err := s.ask(func(ctx context.Context, c *control.Client) (err error) {
		doc, err = c.Processes(ctx, control.ProcessQuery{})
		return err
	})
	return doc, err
}

func (s *script) wantImage(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil || len(words) < 2 {
		return errors.Join(err, errors.New("image PID NAME [KEY=VALUE…]"))
	}
	return s.until(func() string {
		doc, err := s.processesNow()
		if err != nil {
			return err.Error()
		}
		worst := "it has no row"
		for _, p := range doc.Processes {
			for _, im := range p.Images {
				if p.PID != pid || im.Name != words[1] {
					continue
				}
				if worst = differ(fields(im), words[2:]); worst == "" {
					return ""
				}
			}
		}
		return worst
	})
}

func (s *script) wantNoImage(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	return s.until(func() string {
		doc, err := s.processesNow()
		if err != nil {
			return err.Error()
		}
		for _, p := range doc.Processes {
			for _, im := range p.Images {
				if p.PID == pid && (len(words) < 2 || words[1] == im.Name) {
					return fmt.Sprintf("%s is %s", im.Name, im.State)
				}
			}
		}
		return ""
	})
}

// wantCoverage also adds the counts up, in both documents.
func (s *script) wantCoverage(want []string) error {
	return s.until(func() string {
		doc, err := s.processesNow()
		if err != nil {
			return err.Error()
		}
		found, rows, sum := fields(doc.Coverage), 0, 0.0
		for _, p := range doc.Processes {
			rows += len(p.Images)
		}
		for key, v := range found {
			if key != "images" && key != "processes" {
				sum += v.(float64)
			}
		}
		if rows != doc.Coverage.Images || int(sum) != rows {
			return fmt.Sprintf("the counts do not add up: %d rows, %v", rows, found)
		}
		asked := map[string]bool{}
		for _, w := range want {
			key, _, _ := strings.Cut(w, "=")
			asked[key] = true
		}
		full := slices.Clone(want)
		for _, key := range slices.Sorted(maps.Keys(found)) {
			if !asked[key] && key != "processes" {
				full = append(full, key+"=0")
			}
		}
		return differ(found, full)
	})
}

// wantRuns asks memory, not the daemon.
func (s *script) wantRuns(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	module, exports, err := place(arg(words, 1))
	if err != nil || len(words) != 3 {
		return errors.Join(err, errors.New("runs PID MODULE!EXPORT[,EXPORT…] old|ID"))
	}
	return s.until(func() string {
		found, err := s.all(pid, module, strings.Split(exports, ",")...)
		if err != nil {
			return err.Error()
		}
		if found != words[2] {
			return fmt.Sprintf("it runs %s", found)
		}
		return ""
	})
}

// wantWalked: exactly these, in this order, since "follow".
func (s *script) wantWalked(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil || len(words) < 3 {
		return errors.Join(err, errors.New("walked PID MODULE!EXPORT NAME…"))
	}
	x := s.traces[words[0]+" "+words[1]]
	if x == nil {
		return errors.New("nothing follows it")
	}
	module, _, err := place(words[1])
	if err != nil {
		return err
	}
	// The last step is noted by the operation after it, a moment later than it can be seen.
	return s.until(func() string {
		found, err := s.walked(pid, module, x)
		if err != nil {
			return err.Error()
		}
		if found != strings.Join(words[2:], " ") {
			return "it ran " + found
		}
		return ""
	})
}

func (s *script) attentions(code string) ([]control.Attention, error) {
	var list []control.Attention
	err := s.ask(func(ctx context.Context, c *control.Client) error {
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		for _, a := range st.Attention {
			if a.Code == code {
				list = append(list, a)
			}
		}
		return nil
	})
	return list, err
}

func (s *script) wantAttention(words []string) error {
	return s.until(func() string {
		list, err := s.attentions(arg(words, 0))
		if err != nil {
			return err.Error()
		}
		found := "it is not there"
		for _, a := range list {
			if found = differ(fields(a), words[1:]); found == "" {
				return ""
			}
		}
		return found
	})
}

func (s *script) wantNoAttention(words []string) error {
	return s.until(func() string {
		list, err := s.attentions(arg(words, 0))
		if err == nil && len(list) > 0 {
			err = errors.New(list[0].Text)
		}
		if err != nil {
			return err.Error()
		}
		return ""
	})
}

func (s *script) wantHistory(words []string) error {
	return s.until(func() string { return s.historySays(words) })
}

func (s *script) wantNoHistory(words []string) error {
	if s.historySays(words) == "" {
		return errors.New("there is such an entry")
	}
	return nil
}

// historySays is "" if an entry has this action and these keys, else what is found.
func (s *script) historySays(words []string) string {
	found := "there is no such entry"
	err := s.ask(func(ctx context.Context, c *control.Client) error {
		h, err := c.History(ctx, 10000)
		if err != nil {
			return err
		}
		for _, e := range h.Entries {
			if e.Action != arg(words, 0) {
				continue
			}
			keys := fields(e)
			for _, k := range []string{"product", "release", "pid", "exe", "image", "text"} { // left out where empty
				if keys[k] == nil {
					keys[k] = ""
				}
			}
			if found = differ(keys, words[1:]); found == "" {
				return nil
			}
		}
		return nil
	})
	if err != nil {
		return err.Error()
	}
	return found
}

func (s *script) wantList(words []string) error {
	return s.until(func() string {
		found := "it is not listed"
		err := s.ask(func(ctx context.Context, c *control.Client) error {
			doc, err := c.Offers(ctx)
			if err != nil {
				return err
			}
			for _, o := range doc.Releases {
				if o.ID == arg(words, 0) {
					found = differ(fields(o), words[1:])
				}
			}
			return nil
		})
		if err != nil {
			return err.Error()
		}
		return found
	})
}

func (s *script) wantChange(words []string) error {
	if s.change == nil {
		return errors.New("nothing was changed yet")
	}
	if found := differ(fields(s.change), words); found != "" {
		return errors.New(found)
	}
	return nil
}

// wantVerify reads every site again from memory.
func (s *script) wantVerify(words []string) error {
	return s.ask(func(ctx context.Context, c *control.Client) error {
		doc, err := c.Verify(ctx)
		if err != nil {
			return err
		}
		if arg(words, 0) == "ok" {
			words = []string{"ok=true"}
		}
		if found := differ(fields(doc), words); found != "" {
			return fmt.Errorf("%s (%+v)", found, doc)
		}
		return nil
	})
}

func (s *script) wantPlan(words []string) error {
	pid, err := s.pid(arg(words, 0))
	if err != nil {
		return err
	}
	return s.ask(func(ctx context.Context, c *control.Client) error {
		doc, err := c.Plan(ctx, control.PlanQuery{PID: pid})
		if err != nil {
			return err
		}
		for _, p := range doc.Processes {
			for _, im := range p.Images {
				if im.Name == arg(words, 1) {
					if found := differ(fields(im), words[2:]); found != "" {
						return errors.New(found)
					}
					return nil
				}
			}
		}
		return errors.New("it is not planned")
	})
}

func (s *script) wantError(words []string) error {
	if s.failure == nil {
		return errors.New("nothing failed")
	}
	if want := strings.Join(words, " "); !strings.Contains(s.failure.Error(), want) {
		return fmt.Errorf("it failed otherwise: %v", s.failure)
	}
	return nil
}

// describe logs what the daemon says, for a scenario that failed.
func (s *script) describe() {
	st, err := s.statusNow()
	s.t.Logf("status: %v %v", st, err)
	if doc, err := s.processesNow(); err == nil {
		b, _ := json.MarshalIndent(doc.Processes, "", " ")
		s.t.Logf("processes: %s", b)
	}
}
