package control

import (
	"context"
	"net/http"
	"strconv"
)

// access says who may call a route. The zero value is the narrowest.
type access int

const (
	admin access = iota // root and the configured group
	own                 // everyone, but only about his own processes
	open                // everyone, filtered
)

func (a access) String() string { return [...]string{"admin", "own", "open"}[a] }

// route is one call. Exactly one of its functions is set; all see only
// callers that access lets through, and what answer returns goes through the filter.
type route struct {
	method, path string
	access       access
	params       []string // keys that the query may have

	answer func(*call) (doc any, err error)
	stream func(*call) // writes itself, by call's helpers
}

// call is one request under way.
type call struct {
	*Server
	ctx    context.Context
	caller Caller
	w      http.ResponseWriter
	r      *http.Request
	query  map[string]string
	wrote  bool // something went out already
}

// routes is the one table of what the daemon can be asked.
var routes = []route{
	{method: "GET", path: "/v1/status", access: open, answer: (*call).status},
	{method: "GET", path: "/v1/eligibility", access: open, answer: (*call).eligibility},
	{method: "GET", path: "/v1/report", access: open, answer: (*call).fleetReport},
	{method: "GET", path: "/v1/releases", access: open, answer: (*call).offers},
	{method: "GET", path: "/v1/calendar", access: open, answer: (*call).calendar},
	{method: "GET", path: "/v1/processes", access: own, params: []string{"pid", "vulnerable"}, answer: (*call).processes},
	{method: "GET", path: "/v1/events", access: own, stream: (*call).events},
	{method: "GET", path: "/metrics", access: open, stream: (*call).metrics},

	{method: "POST", path: "/v1/check", access: admin, answer: (*call).check},
	{method: "GET", path: "/v1/plan", access: admin, params: []string{"id", "pid"}, answer: (*call).plan},
	{method: "POST", path: "/v1/install", access: admin, stream: (*call).install},
	{method: "POST", path: "/v1/rollback", access: admin, stream: (*call).rollback},
	{method: "POST", path: "/v1/hold", access: admin, answer: (*call).hold},
	{method: "POST", path: "/v1/release-hold", access: admin, answer: (*call).releaseHold},
	{method: "POST", path: "/v1/pause", access: admin, answer: (*call).pause},
	{method: "POST", path: "/v1/resume", access: admin, answer: (*call).resume},
	{method: "GET", path: "/v1/verify", access: admin, answer: (*call).verify},
	{method: "GET", path: "/v1/history", access: admin, params: []string{"limit"}, answer: (*call).history},
	{method: "GET", path: "/v1/explain", access: admin, params: []string{"pid", "address"}, answer: (*call).explain},
	{method: "GET", path: "/v1/diagnose", access: admin, stream: (*call).diagnose},
	{method: "GET", path: "/v1/policy", access: admin, answer: (*call).policy},
}

// find returns the route, or the error that tells what is wrong.
func find(method, path string) (route, *Error) {
	known := false
	for _, r := range routes {
		if r.path == path {
			known = true
			if r.method == method {
				return r, nil
			}
		}
	}
	if known {
		return route{}, Errorf(CodeUsage, "%s is not for %s", path, method)
	}
	return route{}, Errorf(CodeNotFound, "this daemon has no %s", path)
}

func (c *call) status() (any, error)      { return c.cfg.Service.Status(c.ctx, c.caller) }
func (c *call) eligibility() (any, error) { return c.cfg.Service.Eligibility(c.ctx, c.caller) }
func (c *call) offers() (any, error)      { return c.cfg.Service.Offers(c.ctx, c.caller) }
func (c *call) calendar() (any, error)    { return c.cfg.Service.Calendar(c.ctx, c.caller) }
func (c *call) pause() (any, error)       { return c.noBody(c.cfg.Service.Pause) }
func (c *call) resume() (any, error)      { return c.noBody(c.cfg.Service.Resume) }
func (c *call) policy() (any, error)      { return c.cfg.Service.Policy(c.ctx, c.caller) }
func (c *call) verify() (any, error)      { return c.cfg.Service.Verify(c.ctx, c.caller) }

func (c *call) check() (any, error) {
	if err := c.readJSON(&struct{}{}); err != nil {
		return nil, err
	}
	return c.cfg.Service.Check(c.ctx, c.caller)
}

func (c *call) noBody(fn func(context.Context, Caller) (*Change, error)) (any, error) {
	if err := c.readJSON(&struct{}{}); err != nil {
		return nil, err
	}
	return fn(c.ctx, c.caller)
}

func (c *call) processes() (any, error) {
	pid, err := c.pid()
	if err != nil {
		return nil, err
	}
	q := ProcessQuery{PID: pid}
	switch v := c.query["vulnerable"]; v {
	case "", "false":
	case "true":
		q.Vulnerable = true
	default:
		return nil, Errorf(CodeUsage, "vulnerable is true or false, not %q", clip(v))
	}
	return c.cfg.Service.Processes(c.ctx, c.caller, q)
}

func (c *call) plan() (any, error) {
	pid, err := c.pid()
	if err != nil {
		return nil, err
	}
	id := c.query["id"]
	if id != "" {
		if err := checkID(id); err != nil {
			return nil, err
		}
	}
	return c.cfg.Service.Plan(c.ctx, c.caller, PlanQuery{ID: id, PID: pid})
}

// holdRequest is the body of hold and release-hold.
type holdRequest struct {
	ID     string `json:"id"`
	Reason string `json:"reason"`
}

func (c *call) holdBody(fn func(context.Context, Caller, string, string) (*Change, error)) (any, error) {
	var b holdRequest
	if err := c.readJSON(&b); err != nil {
		return nil, err
	}
	if err := checkID(b.ID); err != nil {
		return nil, err
	}
	if len(b.Reason) > maxReason {
		return nil, Errorf(CodeUsage, "a reason has at most %d bytes", maxReason)
	}
	return fn(c.ctx, c.caller, b.ID, b.Reason)
}

func (c *call) hold() (any, error)        { return c.holdBody(c.cfg.Service.Hold) }
func (c *call) releaseHold() (any, error) { return c.holdBody(c.cfg.Service.ReleaseHold) }

func (c *call) history() (any, error) {
	limit := defaultHistory
	if v, ok := c.query["limit"]; ok {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > maxHistory {
			return nil, Errorf(CodeUsage, "limit is a number from 1 to %d, not %q", maxHistory, clip(v))
		}
		limit = n
	}
	return c.cfg.Service.History(c.ctx, c.caller, limit)
}

func (c *call) explain() (any, error) {
	pid, err := c.pid()
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, Errorf(CodeUsage, "explain needs a pid")
	}
	var a Addr
	if err := a.UnmarshalText([]byte(c.query["address"])); err != nil || a == 0 {
		return nil, Errorf(CodeUsage, "address is a hexadecimal number, not %q", clip(c.query["address"]))
	}
	return c.cfg.Service.Explain(c.ctx, c.caller, pid, uint64(a))
}

// pid is the query's pid, 0 if there is none.
func (c *call) pid() (int, error) {
	v, ok := c.query["pid"]
	if !ok {
		return 0, nil
	}
	n, err := strconv.ParseInt(v, 10, 32)
	if err != nil || n < 1 {
		return 0, Errorf(CodeUsage, "pid is a positive number, not %q", clip(v))
	}
	return int(n), nil
}

// checkID holds a release id against its grammar: [A-Za-z0-9][A-Za-z0-9._-]{0,63}.
func checkID(id string) error {
	ok := len(id) >= 1 && len(id) <= 64
	for i := 0; ok && i < len(id); i++ {
		b := id[i]
		alnum := b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9'
		ok = alnum || i > 0 && (b == '.' || b == '_' || b == '-')
	}
	if !ok {
		return Errorf(CodeUsage, "%q is no release id", clip(id))
	}
	return nil
}

// clip shortens what a caller sent before it is repeated to him.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
