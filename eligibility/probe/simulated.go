package probe

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/pelletier/go-toml/v2"

	"hotpatchd/eligibility"
)

// FactsFormat is the first line of a facts file: format = "hotpatchd-facts/1".
const FactsFormat = "hotpatchd-facts/1"

// factText is one fact as the file writes it.
type factText struct {
	Value         string `toml:"value"`
	Text          string `toml:"text"`
	Source        string `toml:"source"`
	Problem       string `toml:"problem"` // instead of value: it is not known, for this reason
	Wanted        string `toml:"wanted"`  // baseline only
	NotApplicable bool   `toml:"not_applicable"`
}

// factsFile has one table for each check.
type factsFile struct {
	Format   string    `toml:"format"`
	OS       *factText `toml:"os"`
	Edition  *factText `toml:"edition"`
	Version  *factText `toml:"version"`
	Arch     *factText `toml:"arch"`
	Managed  *factText `toml:"managed"`
	Policy   *factText `toml:"policy"`
	VBS      *factText `toml:"vbs"`
	CHPE     *factText `toml:"chpe"`
	Baseline *factText `toml:"baseline"`
	Rights   *factText `toml:"rights"`
}

// Simulated reads the facts of a device that is not there, in the format of
// testdata/facts.toml. A fact that the file leaves out is not known.
func Simulated(file string) (eligibility.Facts, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read facts: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read facts: %w", err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("cannot read facts: %s is longer than %d bytes", file, maxFile)
	}
	return parseFacts(file, b)
}

func parseFacts(file string, b []byte) (eligibility.Facts, error) {
	var head struct {
		Format string `toml:"format"`
	}
	if err := toml.Unmarshal(b, &head); err != nil {
		return nil, tomlError(file, err)
	}
	if head.Format != FactsFormat {
		return nil, fmt.Errorf("%s: format is %q, this daemon reads %q", file, head.Format, FactsFormat)
	}
	var in factsFile
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&in); err != nil {
		return nil, tomlError(file, err)
	}
	facts := eligibility.Facts{}
	for id, t := range map[eligibility.ID]*factText{
		eligibility.OS: in.OS, eligibility.Edition: in.Edition, eligibility.Version: in.Version, eligibility.Arch: in.Arch,
		eligibility.Managed: in.Managed, eligibility.Permission: in.Policy, eligibility.VBS: in.VBS, eligibility.CHPE: in.CHPE,
		eligibility.Baseline: in.Baseline, eligibility.Rights: in.Rights,
	} {
		switch {
		case t == nil:
			facts[id] = eligibility.Fact{Source: file, Problem: "the facts file does not tell"}
			continue
		case t.Value != "" && (t.Problem != "" || t.NotApplicable) || t.Problem != "" && t.NotApplicable:
			return nil, fmt.Errorf("%s: [%s] has more than one of value, problem and not_applicable", file, id)
		case t.Value == "" && t.Problem == "" && !t.NotApplicable:
			return nil, fmt.Errorf("%s: [%s] has none of value, problem and not_applicable", file, id)
		case t.Wanted != "" && id != eligibility.Baseline:
			return nil, fmt.Errorf("%s: [%s] wanted: only the baseline has one", file, id)
		}
		source := t.Source
		if source == "" {
			source = file
		}
		facts[id] = eligibility.Fact{
			Known: t.Value != "", Value: printable(t.Value), Text: printable(t.Text), Source: printable(source),
			Problem: printable(t.Problem), Wanted: printable(t.Wanted), NotApplicable: t.NotApplicable,
		}
	}
	return facts, nil
}

// tomlError puts file, line and column before what the parser says.
func tomlError(file string, err error) error {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) && len(missing.Errors) > 0 {
		row, column := missing.Errors[0].Position()
		return fmt.Errorf("%s:%d:%d: unknown key\n%s", file, row, column, missing.String())
	}
	var bad *toml.DecodeError
	if errors.As(err, &bad) {
		row, column := bad.Position()
		return fmt.Errorf("%s:%d:%d: %s\n%s", file, row, column, bad.Error(), bad.String())
	}
	return fmt.Errorf("%s: %w", file, err)
}
