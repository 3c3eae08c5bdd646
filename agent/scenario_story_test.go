package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"hotpatchd/agent/control"
)

func (s *script) chapters(code string) (list []control.Chapter, err error) {
	err = s.ask(func(ctx context.Context, c *control.Client) error {
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		for _, x := range st.Story {
			if x.Code == code {
				list = append(list, x)
			}
		}
		return nil
	})
	return list, err
}

func (s *script) wantStory(words []string) error {
	return s.until(func() string {
		list, err := s.chapters(arg(words, 0))
		if err != nil {
			return err.Error()
		}
		found := "the story does not tell it"
		for _, x := range list {
			if found = differ(fields(x), words[1:]); found == "" {
				return ""
			}
		}
		return found
	})
}

func (s *script) wantNoStory(words []string) error {
	return s.until(func() string {
		list, err := s.chapters(arg(words, 0))
		if err == nil && len(list) > 0 {
			err = errors.New(list[0].What)
		}
		if err != nil {
			return err.Error()
		}
		return ""
	})
}

// wantStands: how long something has been so, by the device's clock, to within an hour.
func (s *script) wantStands(words []string) error {
	want, err := time.ParseDuration(arg(words, 2))
	if err != nil {
		return err
	}
	return s.until(func() string {
		var since []control.Time
		switch arg(words, 0) {
		case "story":
			list, err := s.chapters(words[1])
			if err != nil {
				return err.Error()
			}
			for _, x := range list {
				since = append(since, x.Since)
			}
		case "attention":
			list, err := s.attentions(words[1])
			if err != nil {
				return err.Error()
			}
			for _, x := range list {
				since = append(since, x.Since)
			}
		case "check":
			err := s.ask(func(ctx context.Context, c *control.Client) error {
				doc, err := c.Eligibility(ctx)
				if err != nil {
					return err
				}
				for _, x := range doc.Checks {
					if x.ID == words[1] {
						since = append(since, x.Since)
					}
				}
				return nil
			})
			if err != nil {
				return err.Error()
			}
		default:
			return words[0] + " has no beginning"
		}
		if len(since) != 1 {
			return fmt.Sprintf("%d of %s", len(since), words[1])
		}
		if age := s.now().Sub(since[0].Time); age < want || age > want+time.Hour {
			return fmt.Sprintf("it stands for %s", age.Round(time.Second))
		}
		return ""
	})
}
