package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/user"
	"slices"
	"strings"
	"testing"
	"time"
)

// expectations says for every call what a stranger gets; root and members get
// 200 everywhere. It is written out, not computed from the table it tests.
var expectations = []struct {
	method, path, body string
	stranger           int
	calls              string // what reaches the service
}{
	{"GET", "/v1/status", "", 200, "status"},
	{"GET", "/v1/eligibility", "", 200, "eligibility"},
	{"GET", "/v1/report", "", 200, "status; eligibility"},
	{"GET", "/v1/releases", "", 200, "offers"},
	{"GET", "/v1/calendar", "", 200, "calendar"},
	{"GET", "/v1/processes?pid=7&vulnerable=true", "", 200, "processes 7 true"},
	{"GET", "/v1/events", "", 200, "events"},
	{"GET", "/metrics", "", 200, "metrics"},
	{"POST", "/v1/check", "{}", 403, "check"},
	{"GET", "/v1/plan?id=R-1&pid=7", "", 403, "plan R-1 7"},
	{"POST", "/v1/install", `{"id":"R-1"}`, 403, "install R-1"},
	{"POST", "/v1/rollback", `{"id":"R-1"}`, 403, "rollback R-1"},
	{"POST", "/v1/hold", `{"id":"R-1","reason":"bad"}`, 403, "hold R-1 bad"},
	{"POST", "/v1/release-hold", `{"id":"R-1","reason":"good"}`, 403, "release-hold R-1 good"},
	{"POST", "/v1/pause", "{}", 403, "pause"},
	{"POST", "/v1/resume", "{}", 403, "resume"},
	{"GET", "/v1/verify", "", 403, "verify"},
	{"GET", "/v1/history?limit=5", "", 403, "history 5"},
	{"GET", "/v1/explain?pid=7&address=7ffb2a3c149b", "", 403, "explain 7 7ffb2a3c149b"},
	{"GET", "/v1/diagnose", "", 403, "diagnose"},
	{"GET", "/v1/policy", "", 403, "policy"},
}

func (r *running) request(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://hotpatchd"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := r.client.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if path == "/v1/events" && res.StatusCode == 200 {
		line, _ := bufio.NewReader(res.Body).ReadString('\n')
		return 200, line
	}
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(b)
}

func TestEveryRouteForEveryCaller(t *testing.T) {
	r := start(t, nil)
	r.fake.events = []Event{{Type: EventState, Text: "state", Scope: Scope{Public: true}}}
	var listed []string
	for _, e := range expectations {
		path, _, _ := strings.Cut(e.path, "?")
		listed = append(listed, e.method+" "+path)
		for _, c := range []Caller{rootCaller, memberCaller, strangerCaller} {
			r.as(c)
			r.fake.calls, r.fake.callers = nil, nil
			want := 200
			if !c.Admin {
				want = e.stranger
			}
			got, body := r.request(t, e.method, e.path, e.body)
			name := fmt.Sprintf("%s %s as %s", e.method, e.path, c.User)
			if got != want {
				t.Errorf("%s: %d, want %d: %s", name, got, want, body)
			}
			if want == 403 {
				if r.fake.seen() != "" {
					t.Errorf("%s: refused, but the service was asked %q", name, r.fake.seen())
				}
				var doc errorDoc
				if err := json.Unmarshal([]byte(body), &doc); err != nil || doc.Error == nil || doc.Error.Code != CodeNotPermitted {
					t.Errorf("%s: refused with %s", name, body)
				} else if !strings.Contains(doc.Error.Text, "needs "+rootName+" or membership in the group hotpatch; you are alice") {
					t.Errorf("%s: says %q", name, doc.Error.Text)
				}
				continue
			}
			if r.fake.seen() != e.calls {
				t.Errorf("%s: the service was asked %q, want %q", name, r.fake.seen(), e.calls)
			}
			other := func(x Caller) bool { return x != c }
			if e.calls != "metrics" && (len(r.fake.callers) != 1+strings.Count(e.calls, ";") || slices.ContainsFunc(r.fake.callers, other)) {
				t.Errorf("%s: the service saw %v", name, r.fake.callers)
			}
			if !c.Admin || e.path == "/v1/report" {
				noSecrets(t, name, body)
			}
		}
	}
	var table []string
	for _, rt := range routes {
		table = append(table, rt.method+" "+rt.path)
	}
	slices.Sort(table)
	slices.Sort(listed)
	if !slices.Equal(table, listed) {
		t.Errorf("routes  %v\ntested  %v", table, listed)
	}
	if !strings.Contains(r.reported(), "alice: pause needs "+rootName) {
		t.Errorf("refusals were not reported: %s", r.reported())
	}
}

func noSecrets(t *testing.T, name, body string) {
	t.Helper()
	if strings.Contains(body, "4711") || strings.Contains(body, "garbage") {
		t.Errorf("%s: metrics of one process: %s", name, body)
	}
	var doc any
	if json.Unmarshal([]byte(body), &doc) != nil {
		if !strings.Contains(body, `hotpatch_images{state="patched",product="a,b"} 3`) {
			t.Errorf("%s: neither a document nor metrics: %s", name, body)
		}
		return
	}
	// Fields that name a release or a program may hold anything; sentences may not.
	sentences := []string{"reason", "text", "found", "detail", "base", "annex", "path", "by"}
	each(doc, func(k string, v any) {
		s, _ := v.(string)
		if slices.Contains(sentences, k) && (strings.Contains(s, "7ffb2a3c149b") || strings.Contains(s, "cc cc")) {
			t.Errorf("%s: %s = %q", name, k, s)
		}
	})
}

func each(v any, fn func(key string, v any)) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			fn(k, x)
			each(x, fn)
		}
	case []any:
		for _, x := range v {
			each(x, fn)
		}
	}
}

// TestStrangersSeeOnlyWhatIsListed fills every field of every document and
// holds what is left for a stranger against a list kept by hand.
func TestStrangersSeeOnlyWhatIsListed(t *testing.T) {
	var got []string
	f := &fakeService{}
	for name, doc := range map[string]any{
		"status": answer[Status](f, "x"), "eligibility": answer[Eligibility](f, "x"), "list": answer[Offers](f, "x"), "calendar": answer[Calendar](f, "x"),
		"processes": answer[Processes](f, "x"), "event": answer[Event](f, "x"),
		"plan": answer[Plan](f, "x"), "change": answer[Change](f, "x"), "verify": answer[Verify](f, "x"),
		"report":  NewReport(answer[Status](f, "x"), answer[Eligibility](f, "x")),
		"history": answer[History](f, "x"), "explain": answer[Explain](f, "x"), "policy": answer[Settings](f, "x"),
	} {
		seen := filter(strangerCaller, doc)
		if seen == nil {
			got = append(got, name+" nothing")
			continue
		}
		b, err := encode(seen, "1.2", testNow)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		got = append(got, keys(name, v)...)
	}
	slices.Sort(got)
	got = slices.Compact(got)
	file, err := os.ReadFile("testdata/strangers.txt")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSpace(string(file)), "\n")
	for _, k := range got {
		if !slices.Contains(want, k) {
			t.Errorf("a stranger sees %s", k)
		}
	}
	for _, k := range want {
		if !slices.Contains(got, k) {
			t.Errorf("a stranger does not see %s", k)
		}
	}
}

// keys lists the paths of all values that are not zero.
func keys(prefix string, v any) (out []string) {
	switch v := v.(type) {
	case map[string]any:
		for k, x := range v {
			out = append(out, keys(prefix+"."+k, x)...)
		}
		return out
	case []any:
		for _, x := range v {
			out = append(out, keys(prefix+"[]", x)...)
		}
		return out
	case nil:
		return nil
	case bool:
		if !v {
			return nil
		}
	case string:
		if v == "" {
			return nil
		}
	case float64:
		if v == 0 {
			return nil
		}
	}
	return []string{prefix}
}

func TestOthersRowsAreLeftOut(t *testing.T) {
	r := start(t, nil).as(strangerCaller)
	r.fake.docs = map[string]any{
		"processes": &Processes{Coverage: Coverage{Processes: 3, Images: 3, Patched: 3}, Processes: []Process{
			{PID: 1, UID: 0, Exe: "root.exe"}, {PID: 2, UID: strangerUID, Exe: "mine.exe"}, {PID: 3, UID: memberUID, Exe: "bobs.exe"}}},
		"status": &Status{Attention: []Attention{{Code: "public", Scope: Scope{Public: true}}, {Code: "mine", Scope: Scope{OfUser: true, UID: strangerUID}},
			{Code: "bobs", Scope: Scope{OfUser: true, UID: memberUID}}, {Code: "default"}, {Code: "uid-only", Scope: Scope{UID: strangerUID}}},
			Repository: Repository{URL: "https://user:secret@patches.example.com/a?token=1#x"}},
	}
	ctx := context.Background()
	p, err := r.client.Processes(ctx, ProcessQuery{})
	if err != nil || len(p.Processes) != 1 || p.Processes[0].PID != 2 || p.Coverage.Images != 3 {
		t.Errorf("%+v, %v", p, err)
	}
	s, err := r.client.Status(ctx)
	if err != nil || len(s.Attention) != 2 || s.Attention[0].Code != "public" || s.Attention[1].Code != "mine" {
		t.Errorf("%+v, %v", s, err)
	}
	if s.Repository.URL != "https://patches.example.com/a" {
		t.Errorf("url %q", s.Repository.URL)
	}
	r.as(memberCaller)
	if p, err := r.client.Processes(ctx, ProcessQuery{}); err != nil || len(p.Processes) != 3 {
		t.Errorf("a member sees %+v, %v", p, err)
	}
	if s, err := r.client.Status(ctx); err != nil || len(s.Attention) != 5 || !strings.Contains(s.Repository.URL, "secret") {
		t.Errorf("a member sees %+v, %v", s, err)
	}
}

func TestEventsOfOthersAreLeftOut(t *testing.T) {
	r := start(t, nil).as(strangerCaller)
	r.fake.events = []Event{
		{Type: EventImage, Text: "root's", PID: 1, Scope: Scope{}},
		{Type: EventImage, Text: "bob's", PID: 3, Scope: Scope{OfUser: true, UID: memberUID}},
		{Type: EventImage, Text: "mine", PID: 2, Scope: Scope{OfUser: true, UID: strangerUID}},
		{Type: EventState, Text: "all", Scope: Scope{Public: true}},
	}
	close(r.fake.live)
	var got []string
	err := r.client.Events(context.Background(), nil, func(e Event) error {
		got = append(got, e.Text)
		if e.Format != FormatEvent || e.Version != "1.2" || e.Generated.IsZero() {
			t.Errorf("header %+v", e.Header)
		}
		return nil
	})
	if err == nil || strings.Join(got, ",") != "mine,all" {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestErrorsInsideAreNotForStrangers(t *testing.T) {
	r := start(t, nil)
	r.fake.err = fmt.Errorf("cannot read 7ffb2a3c149b of pid 880 in /root/secret")
	for _, c := range []Caller{memberCaller, strangerCaller} {
		_, err := r.as(c).client.Status(context.Background())
		e := asError(err)
		if e.Code != CodeInternal || strings.Contains(e.Text, "secret") == !c.Admin {
			t.Errorf("%s reads %q (%s)", c.User, e.Text, e.Code)
		}
	}
	if !strings.Contains(r.reported(), "secret") {
		t.Error("nobody was told")
	}
}

func TestScrub(t *testing.T) {
	for in, want := range map[string]string{
		"at 7ffb2a3c149b":                        "at …",
		"at 0x140001000, in 0x1 of 2":            "at …, in 0x1 of 2",
		"at 140001000":                           "at …",
		"bytes cc cc cc 48 89 differ":            "bytes … differ",
		"ACME-2026-11 of 20261103, pid 31211":    "ACME-2026-11 of 20261103, pid 31211",
		"thread 2298 in ReadFrame, 4 m 10 s":     "thread 2298 in ReadFrame, 4 m 10 s",
		"5d0f2a1c-1111-2222-3333-444444444444/2": "…-1111-2222-3333-…/2",
		"decade feedback facade":                 "decade feedback facade",
	} {
		if got := scrub(in); got != want {
			t.Errorf("scrub(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestListsAreNeverNull(t *testing.T) {
	for _, doc := range []any{&Status{}, &Eligibility{}, &Offers{}, &Calendar{}, &Calendar{Months: []CalendarMonth{{}}}, &Processes{Processes: []Process{{}}}, &Plan{Processes: []PlannedProcess{{Images: []PlannedImage{{}}}}},
		&Change{}, &Verify{}, &History{}} {
		b, err := encode(doc, "1.2", testNow)
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"releases", "attention", "checks", "processes", "images", "functions", "results", "mismatches", "entries", "holds", "cves", "months", "products"} {
			if bytes.Contains(b, []byte(`"`+key+`":null`)) {
				t.Errorf("%T: %s is null: %s", doc, key, b)
			}
		}
	}
	if b, _ := encode(&Status{}, "1.2", testNow); !bytes.Contains(b, []byte(`"release":null`)) || !bytes.Contains(b, []byte(`"error":null`)) {
		t.Errorf("no release and no error are null: %s", b)
	}
}

// Who held a release, and why, is the operators' affair.
func TestStrangersDoNotSeeWhoHolds(t *testing.T) {
	const why = "held by root since 2026-11-22T12:00:00Z: it eats memory"
	offers := &Offers{Releases: []Offer{{ID: "R1", Held: true, ReasonCode: "held", Reason: why}}}
	processes := &Processes{Processes: []Process{{UID: strangerCaller.UID, Images: []Image{{Name: "a.dll", ReasonCode: "held", Reason: why}}}}}
	status := &Status{Holds: []Hold{{ID: "R1", By: "root", Reason: "it eats memory"}}}
	dates := &Calendar{Products: []CalendarProduct{{Offered: "R1", ReasonCode: "held", Reason: why}}}
	for _, doc := range []any{offers, processes, status, dates} {
		b, err := encode(filter(strangerCaller, doc), "1", testNow)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "root") || strings.Contains(string(b), "memory") || !strings.Contains(string(b), "R1") && !strings.Contains(string(b), "held on this device") {
			t.Errorf("a stranger sees %s", b)
		}
		if b, _ = encode(filter(rootCaller, doc), "1", testNow); !strings.Contains(string(b), "memory") {
			t.Errorf("an operator does not see why: %s", b)
		}
	}
}

// The refusal says how to become one who may, also where there is no such group yet.
func TestGroupHint(t *testing.T) {
	if got := groupHint("hotpatch-no-such-group", "linux"); !strings.Contains(got, "there is no group hotpatch-no-such-group") || !strings.Contains(got, "groupadd hotpatch-no-such-group") {
		t.Error(got)
	}
	if got := groupHint("hotpatch-no-such-group", "windows"); !strings.Contains(got, "net localgroup hotpatch-no-such-group /add") {
		t.Error(got)
	}
	if g, err := user.LookupGroupId("0"); err == nil {
		if got := groupHint(g.Name, "linux"); strings.Contains(got, "there is no") || !strings.Contains(got, g.Name) {
			t.Error(got)
		}
	}
}
