package main

import (
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"hotpatchd/agent/control"
)

func (s *session) policyCommand() *cobra.Command {
	return &cobra.Command{
		Use: "policy", Short: "Every setting in force, and where it comes from", Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			d, err := s.client.Policy(c.Context())
			if err != nil {
				return err
			}
			return s.show(d, func() string { return s.screen.policy(d) })
		},
	}
}

// policy shows policy and configuration key by key.
func (s *screen) policy(d *control.Settings) string {
	p := &page{}
	if d.Problem != "" {
		why, place, _ := strings.Cut(d.Problem, "\n")
		p.verdict(s, bad, "NOT IN FORCE", "The policy as it stands is refused; the last good one stays in force. "+why)
		for l := range strings.Lines(place) { // the line of the file, and a mark below its column
			p.line("%s", clean(strings.TrimRight(l, "\n")))
		}
		p.blank()
	}
	table := func(title string, all []control.Setting) {
		var rows [][]string
		for _, x := range all {
			rows = append(rows, []string{x.Key, x.Value, x.Source})
		}
		if s.wide {
			p.whole([]string{title, "VALUE", "FROM"}, rows)
			return
		}
		p.table(s, []column{{title, 26, 12}, {"VALUE", 40, 16}, {title: "FROM"}}, rows, nil)
	}
	table("POLICY", d.Policy)
	p.blank()
	table("CONFIGURATION", d.Configuration)
	p.blank()
	p.line("The policy is read anew when it changes; the configuration when the daemon starts.")
	return p.String()
}

// whole prints rows in columns without shortening or wrapping anything: for
// programs that read them.
func (p *page) whole(titles []string, rows [][]string) {
	rows = slices.Concat([][]string{titles}, rows)
	widths := make([]int, len(titles))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(clean(cell)))
		}
	}
	for _, row := range rows {
		line := ""
		for i, cell := range row {
			line += pad(clean(cell), widths[i]+2)
		}
		p.line("%s", line)
	}
}
