package control

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"strings"
	"testing"
	"time"
)

// deadline is for what should happen at once, on a machine that is busy with other things.
const deadline = 20 * time.Second

// raw sends bytes and reads the answer as far as it comes.
func (r *running) raw(t *testing.T, send string) (status int, body string, err error) {
	t.Helper()
	c, err := dial(t.Context(), r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(deadline))
	go io.WriteString(c, send)
	method, _, _ := strings.Cut(send, " ")
	res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: method})
	if err != nil {
		return 0, "", err
	}
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

func (r *running) alive(t *testing.T, after string) {
	t.Helper()
	if _, err := r.client.Status(context.Background()); err != nil {
		t.Errorf("after %s: %v", after, err)
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	r := start(t, nil)
	get := func(target, host string) string { return "GET " + target + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }
	post := func(path, kind, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: hotpatchd\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", path, kind, len(body), body)
	}
	const js = "application/json"
	for name, tc := range map[string]struct {
		send string
		want int
	}{
		"other host":             {get("/v1/status", "example.com"), 400},
		"host with port":         {get("/v1/status", "hotpatchd:80"), 400},
		"empty host":             {get("/v1/status", ""), 400},
		"no host":                {"GET /v1/status HTTP/1.0\r\n\r\n", 400},
		"absolute, other host":   {get("http://evil/v1/status", "hotpatchd"), 400},
		"absolute, right host":   {get("http://hotpatchd/v1/status", "hotpatchd"), 404},
		"double slash":           {get("/v1//status", "hotpatchd"), 404},
		"leading double slash":   {get("//v1/status", "hotpatchd"), 404},
		"trailing slash":         {get("/v1/status/", "hotpatchd"), 404},
		"dots":                   {get("/v1/x/../status", "hotpatchd"), 404},
		"encoded slash":          {get("/v1%2fstatus", "hotpatchd"), 404},
		"case":                   {get("/V1/status", "hotpatchd"), 404},
		"nul":                    {get("/v1/status%00", "hotpatchd"), 404},
		"root":                   {get("/", "hotpatchd"), 404},
		"pprof":                  {get("/debug/pprof/", "hotpatchd"), 404},
		"star":                   {"OPTIONS * HTTP/1.1\r\nHost: hotpatchd\r\n\r\n", 404},
		"connect":                {"CONNECT hotpatchd HTTP/1.1\r\nHost: hotpatchd\r\n\r\n", 404},
		"wrong method":           {post("/v1/status", js, "{}"), 400},
		"get changes nothing":    {get("/v1/rollback", "hotpatchd"), 400},
		"head":                   {"HEAD /v1/status HTTP/1.1\r\nHost: hotpatchd\r\nConnection: close\r\n\r\n", 400},
		"unknown parameter":      {get("/v1/processes?user=0", "hotpatchd"), 400},
		"parameter twice":        {get("/v1/processes?pid=1&pid=2", "hotpatchd"), 400},
		"broken query":           {get("/v1/processes?pid=%zz", "hotpatchd"), 400},
		"long query":             {get("/v1/processes?pid="+strings.Repeat("1", 2000), "hotpatchd"), 400},
		"pid zero":               {get("/v1/processes?pid=0", "hotpatchd"), 400},
		"pid minus":              {get("/v1/processes?pid=-1", "hotpatchd"), 400},
		"pid too large":          {get("/v1/processes?pid=99999999999", "hotpatchd"), 400},
		"pid text":               {get("/v1/processes?pid=abc", "hotpatchd"), 400},
		"vulnerable text":        {get("/v1/processes?vulnerable=maybe", "hotpatchd"), 400},
		"limit":                  {get("/v1/history?limit=1000000", "hotpatchd"), 400},
		"limit minus":            {get("/v1/history?limit=-5", "hotpatchd"), 400},
		"explain without pid":    {get("/v1/explain?address=1", "hotpatchd"), 400},
		"explain no address":     {get("/v1/explain?pid=1", "hotpatchd"), 400},
		"explain bad address":    {get("/v1/explain?pid=1&address=zz", "hotpatchd"), 400},
		"explain long address":   {get("/v1/explain?pid=1&address=fffffffffffffffff", "hotpatchd"), 400},
		"plan bad id":            {get("/v1/plan?id=../../etc/passwd", "hotpatchd"), 400},
		"no content type":        {"POST /v1/pause HTTP/1.1\r\nHost: hotpatchd\r\nContent-Length: 2\r\n\r\n{}", 400},
		"form":                   {post("/v1/pause", "application/x-www-form-urlencoded", "a=b"), 400},
		"garbage":                {post("/v1/rollback", js, "\x00\xff garbage"), 400},
		"empty body":             {post("/v1/rollback", js, ""), 400},
		"list":                   {post("/v1/rollback", js, "[]"), 400},
		"unknown key":            {post("/v1/rollback", js, `{"id":"R-1","force":true}`), 400},
		"unknown key, empty":     {post("/v1/pause", js, `{"x":1}`), 400},
		"two documents":          {post("/v1/rollback", js, `{"id":"R-1"}{}`), 400},
		"trailing text":          {post("/v1/rollback", js, `{"id":"R-1"} x`), 400},
		"wrong type":             {post("/v1/rollback", js, `{"id":7}`), 400},
		"deep":                   {post("/v1/rollback", js, strings.Repeat(`{"id":`, 10000)), 400},
		"id is a path":           {post("/v1/rollback", js, `{"id":"../x"}`), 400},
		"id begins with a dash":  {post("/v1/hold", js, `{"id":"-x"}`), 400},
		"id too long":            {post("/v1/hold", js, `{"id":"`+strings.Repeat("a", 65)+`"}`), 400},
		"hold without id":        {post("/v1/hold", js, `{}`), 400},
		"long reason":            {post("/v1/hold", js, `{"id":"a","reason":"`+strings.Repeat("r", 2000)+`"}`), 400},
		"install id with slash":  {post("/v1/install", js, `{"id":"a/b"}`), 400},
		"install with path":      {post("/v1/install", js, `{"file":"/etc/passwd"}`), 400},
		"large body":             {post("/v1/rollback", js, `{"id":"`+strings.Repeat("a", maxBody)+`"}`), 413},
		"large header":           {"GET /v1/status HTTP/1.1\r\nHost: hotpatchd\r\nX: " + strings.Repeat("x", 1<<20) + "\r\n\r\n", 431},
		"many headers":           {"GET /v1/status HTTP/1.1\r\nHost: hotpatchd\r\n" + strings.Repeat("X: y\r\n", 100000) + "\r\n", 431},
		"long target":            {get("/"+strings.Repeat("a", 1<<20), "hotpatchd"), 431},
		"two lengths":            {"POST /v1/pause HTTP/1.1\r\nHost: hotpatchd\r\nContent-Type: application/json\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400},
		"no HTTP":                {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", 400},
		"HTTP/2 preface":         {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400},
		"multipart, no boundary": {post("/v1/install", "multipart/form-data", "x"), 400},
	} {
		t.Run(name, func(t *testing.T) {
			status, body, err := r.raw(t, tc.send)
			if err != nil || status != tc.want {
				t.Errorf("%d %s, %v; want %d", status, body, err, tc.want)
			}
		})
	}
	if seen := r.fake.seen(); seen != "" {
		t.Errorf("something reached the service: %s", seen)
	}
	r.alive(t, "all that")
}

func TestSlowPeersAreCutOff(t *testing.T) {
	r := start(t, func(s *Server) {
		s.http.ReadHeaderTimeout = 200 * time.Millisecond
		s.bodyWait = 200 * time.Millisecond
	})
	for name, send := range map[string]string{
		"nothing":   "",
		"half head": "GET /v1/status HTTP/1.1\r\nHost: hot",
		"half body": "POST /v1/rollback HTTP/1.1\r\nHost: hotpatchd\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"id\":",
	} {
		c, err := dial(t.Context(), r.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, send)
		c.SetReadDeadline(time.Now().Add(deadline))
		if _, err := io.Copy(io.Discard, c); err != nil {
			t.Errorf("%s: the connection was kept: %v", name, err)
		}
	}
	r.alive(t, "slow peers")
}

func TestManyConnectionsOfOneUser(t *testing.T) {
	r := start(t, nil).as(strangerCaller)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range maxConnsPerUser {
		c, err := dial(t.Context(), r.socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	// A pipe hands connections on in any order.
	until(t, "all of them are counted", func() bool {
		r.gate.mu.Lock()
		defer r.gate.mu.Unlock()
		return r.gate.total == maxConnsPerUser
	})
	// The refusal may come before the request is written, and is then lost to the client.
	until(t, "one connection too many is refused in words", func() bool {
		_, err := r.client.Status(context.Background())
		if err == nil {
			t.Fatal("one connection too many was served")
		}
		return errors.Is(err, &Error{Code: CodeOverloaded})
	})
	r.as(rootCaller).alive(t, "a stranger's many connections")
	r.as(Caller{UID: 1003, User: "carol"}).alive(t, "a stranger's many connections")
	r.as(strangerCaller)
	conns[0].Close()
	until(t, "a place is free again", func() bool {
		_, err := r.client.Status(context.Background())
		return err == nil
	})
}

func TestManyUsersDoNotKeepRootOut(t *testing.T) {
	var g gate
	for uid := 1; g.enter(uid); uid++ {
		for g.byUser[uid] < maxConnsPerUser && g.enter(uid) {
		}
	}
	if g.total != maxConns {
		t.Errorf("%d connections", g.total)
	}
	if !g.enter(0) {
		t.Error("root is kept out")
	}
	g.leave(0)
	for uid, n := range g.byUser {
		for range n {
			g.leave(uid)
		}
	}
	if g.total != 0 || len(g.byUser) != 0 {
		t.Errorf("left over: %+v", g.byUser)
	}
}

// until waits for a condition.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", deadline, what)
		}
	}
}

// upload builds a multipart body by hand.
func upload(parts ...[3]string) (kind, body string) {
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	for _, p := range parts {
		h := textproto.MIMEHeader{}
		disposition := `form-data; name="` + p[0] + `"`
		if p[1] != "" {
			disposition += `; filename="` + p[1] + `"`
		}
		h.Set("Content-Disposition", disposition)
		w, _ := m.CreatePart(h)
		io.WriteString(w, p[2])
	}
	m.Close()
	return m.FormDataContentType(), b.String()
}

func TestUploads(t *testing.T) {
	r := start(t, nil)
	release := [3]string{"release", "x", "zipzip"}
	many := [][3]string{release}
	for i := range maxMetadata + 1 {
		many = append(many, [3]string{"metadata", fmt.Sprintf("%d.json", i), "{}"})
	}
	big := strings.Repeat("x", MaxMetadata)
	var sum [][3]string
	for i := range MaxMetadataSum/MaxMetadata + 1 {
		sum = append(sum, [3]string{"metadata", fmt.Sprintf("%d.json", i), big})
	}
	for name, tc := range map[string]struct {
		parts [][3]string
		want  int
	}{
		"good":           {[][3]string{{"metadata", "1.root.json", "{}"}, {"metadata", "timestamp.json", "{ }"}, release}, 200},
		"no release":     {[][3]string{{"metadata", "1.root.json", "{}"}}, 400},
		"empty release":  {[][3]string{{"release", "x", ""}}, 400},
		"two releases":   {[][3]string{release, release}, 400},
		"unknown part":   {[][3]string{release, {"id", "", "R-1"}}, 400},
		"path":           {[][3]string{release, {"metadata", "../../etc/x.json", "{}"}}, 400},
		"windows path":   {[][3]string{release, {"metadata", `..\\x.json`, "{}"}}, 400},
		"hidden":         {[][3]string{release, {"metadata", ".x", "{}"}}, 400},
		"no name":        {[][3]string{release, {"metadata", "", "{}"}}, 400},
		"long name":      {[][3]string{release, {"metadata", strings.Repeat("a", 200), "{}"}}, 400},
		"same twice":     {[][3]string{release, {"metadata", "a.json", "{}"}, {"metadata", "a.json", "[]"}}, 400},
		"too many":       {many, 400},
		"large metadata": {[][3]string{release, {"metadata", "a.json", big + "x"}}, 413},
		"large sum":      {append(sum, release), 413},
	} {
		t.Run(name, func(t *testing.T) {
			r.fake.calls, r.fake.install = nil, InstallRequest{}
			kind, body := upload(tc.parts...)
			status, answer, err := r.raw(t, fmt.Sprintf("POST /v1/install HTTP/1.1\r\nHost: hotpatchd\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", kind, len(body), body))
			if err != nil || status != tc.want {
				t.Fatalf("%d %.300s, %v; want %d", status, answer, err, tc.want)
			}
			if (r.fake.seen() != "") != (tc.want == 200) {
				t.Errorf("the service was asked %q", r.fake.seen())
			}
			if tc.want == 200 && (string(r.fake.install.File) != "zipzip" || string(r.fake.install.Metadata["timestamp.json"]) != "{ }" || len(r.fake.install.Metadata) != 2) {
				t.Errorf("it arrived as %+v", r.fake.install)
			}
		})
	}
	kind, body := upload(release)
	status, answer, err := r.raw(t, fmt.Sprintf("POST /v1/install HTTP/1.1\r\nHost: hotpatchd\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", kind, len(body)-5, body[:len(body)-5]))
	if err != nil || status != 400 {
		t.Errorf("cut short: %d %s, %v", status, answer, err)
	}
	r.alive(t, "uploads")
	if len(r.Server.upload) != 0 {
		t.Error("the upload's place was not given back")
	}
}

func TestEndlessUploadIsCutOff(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a few seconds and 256 MiB")
	}
	r := start(t, nil)
	pr, pw := io.Pipe()
	m := multipart.NewWriter(pw)
	go func() {
		w, _ := m.CreateFormFile("release", "x")
		chunk := make([]byte, 1<<20)
		for {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}()
	_, err := r.client.change(context.Background(), "/v1/install", m.FormDataContentType(), pr, -1, nil)
	pr.Close()
	if !errors.Is(err, &Error{Code: CodeTooLarge}) {
		t.Errorf("got %v", err)
	}
	if r.fake.seen() != "" {
		t.Error("it reached the service")
	}
	r.alive(t, "an endless upload")
}

func TestStrangersUploadIsRefusedUnread(t *testing.T) {
	r := start(t, nil).as(strangerCaller)
	_, err := r.client.Install(context.Background(), InstallRequest{File: make([]byte, 64<<20)}, nil)
	if !errors.Is(err, &Error{Code: CodeNotPermitted}) {
		t.Errorf("got %v", err)
	}
}

func TestOneUploadAtATime(t *testing.T) {
	r := start(t, nil)
	r.Server.upload <- struct{}{}
	_, err := r.client.Install(context.Background(), InstallRequest{File: []byte("x")}, nil)
	if !errors.Is(err, &Error{Code: CodeConflict}) {
		t.Errorf("got %v", err)
	}
	<-r.Server.upload
	if _, err = r.client.Install(context.Background(), InstallRequest{File: []byte("x")}, nil); err != nil {
		t.Error(err)
	}
}

func TestPanicInTheServiceEndsOneCall(t *testing.T) {
	r := start(t, nil)
	r.fake.panics = true
	_, err := r.client.Status(context.Background())
	if !errors.Is(err, &Error{Code: CodeInternal}) {
		t.Errorf("got %v", err)
	}
	if !strings.Contains(r.reported(), "panic in GET /v1/status: boom") {
		t.Errorf("reported: %s", r.reported())
	}
	r.fake.panics = false
	r.alive(t, "a panic")
}

// TestReaderThatDoesNotRead: a peer that takes no events is dropped and holds
// up nobody.
func TestReaderThatDoesNotRead(t *testing.T) {
	r := start(t, func(s *Server) { s.writeWait = 200 * time.Millisecond })
	c, err := dial(t.Context(), r.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /v1/events HTTP/1.1\r\nHost: hotpatchd\r\n\r\n")
	stop := time.After(deadline)
	for gone := false; !gone; {
		select {
		case r.fake.live <- Event{Type: EventImage, Text: strings.Repeat("x", 1<<16)}:
		case <-r.fake.left:
			gone = true
		case <-stop:
			t.Fatal("the peer is still served")
		}
	}
	r.alive(t, "a reader that does not read")
}
