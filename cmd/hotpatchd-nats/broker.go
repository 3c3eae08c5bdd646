package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"hotpatchd/agent/report"
)

// Names at the broker. A device may publish to its own subject below
// statusPrefix and read lookKey, nothing else: see README, Fleets.
const (
	streamName   = "HOTPATCH_STATUS"
	statusPrefix = "hotpatch.status."
	bucketName   = "hotpatch"
	lookKey      = "look"
)

const (
	// duplicates is how long the stream knows an id again: a device that was cut
	// off between its report and the answer is back by then, or sends it twice.
	duplicates = 2 * time.Hour
	// perDevice and keepFor bound what the stream keeps.
	perDevice = 100
	keepFor   = 90 * 24 * time.Hour
	// reconnectMost is the longest pause between two tries to reach the broker.
	reconnectMost = time.Minute
)

// encrypted tells whether TLS must be used: always, but for this machine.
func (s *settings) encrypted() (bool, error) {
	local := 0
	servers := strings.Split(s.server, ",")
	for _, text := range servers {
		u, err := url.Parse(strings.TrimSpace(text))
		if err != nil || u.Hostname() == "" {
			return false, errors.New("--server is a URL such as tls://broker.example.com:4222") // it may hold a password
		}
		switch u.Scheme {
		case "nats", "tls", "ws", "wss":
		default:
			return false, fmt.Errorf("--server: %s:// is not tls://", u.Scheme)
		}
		address, err := netip.ParseAddr(u.Hostname())
		isLocal := u.Hostname() == "localhost" || err == nil && address.IsLoopback()
		if isLocal && u.Scheme == "nats" {
			local++
		} else if u.Scheme != "tls" && u.Scheme != "wss" {
			return false, fmt.Errorf("--server: %s:// is for this machine's own addresses only, use tls://", u.Scheme)
		}
	}
	if local > 0 && local < len(servers) {
		return false, errors.New("--server: either all on this machine or none")
	}
	return local == 0, nil
}

// connect makes a connection that is kept up for as long as the program runs.
// The broker's word on other servers is not followed.
func (s *settings) connect(log *slog.Logger, more ...nats.Option) (*nats.Conn, error) {
	secure, err := s.encrypted()
	if err != nil {
		return nil, err
	}
	options := []nats.Option{
		nats.Name("hotpatchd-nats " + version), nats.MaxReconnects(-1), nats.IgnoreDiscoveredServers(), nats.IgnoreAuthErrorAbort(),
		nats.CustomReconnectDelay(func(attempts int) time.Duration {
			return report.Pace{First: time.Second, Most: reconnectMost}.Wait(attempts, 0, random())
		}),
		// What is not acknowledged is in the spool: nothing is kept in memory.
		nats.ReconnectBufSize(-1),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			if err != nil {
				log.Warn("the broker is away", "error", err)
			}
		}),
		nats.ReconnectHandler(func(c *nats.Conn) { log.Info("the broker is back", "server", c.ConnectedUrlRedacted()) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { log.Warn("the broker", "error", err) }),
	}
	if secure {
		options = append(options, nats.Secure())
	}
	if s.ca != "" {
		options = append(options, nats.RootCAs(s.ca))
	}
	if s.cert != "" {
		options = append(options, nats.ClientCert(s.cert, s.key))
	}
	if s.creds != "" {
		options = append(options, nats.UserCredentials(s.creds))
	}
	nc, err := nats.Connect(s.server, append(options, more...)...)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to the broker: %w", err)
	}
	return nc, nil
}

// setup makes the stream and the bucket, or brings them up to date.
func setup(ctx context.Context, js jetstream.JetStream) error {
	_, err := js.CreateOrUpdateStream(ctx, jetstream.StreamConfig{
		Name: streamName, Description: "reports of devices", Subjects: []string{statusPrefix + "*"}, Storage: jetstream.FileStorage,
		Duplicates: duplicates, MaxMsgsPerSubject: perDevice, MaxAge: keepFor, MaxMsgSize: report.MaxReport, Discard: jetstream.DiscardOld, AllowDirect: true,
	})
	if err != nil {
		return fmt.Errorf("cannot make the stream: %w", err)
	}
	_, err = js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: bucketName, Description: "wakes devices", History: 1, Storage: jetstream.FileStorage})
	if err != nil {
		return fmt.Errorf("cannot make the bucket: %w", err)
	}
	return nil
}

// tellToLook changes the key that devices watch. Its value is for people who look at the bucket.
func tellToLook(ctx context.Context, js jetstream.JetStream) error {
	kv, err := js.KeyValue(ctx, bucketName)
	if err == nil {
		_, err = kv.PutString(ctx, lookKey, time.Now().UTC().Format(time.RFC3339))
	}
	if err != nil {
		return fmt.Errorf("cannot tell devices to look: %w", err)
	}
	return nil
}

// pull writes the newest report of each device to DIR/DEVICE.json.
func pull(ctx context.Context, js jetstream.JetStream, dir string) (devices int, err error) {
	stream, err := js.Stream(ctx, streamName)
	if err != nil {
		return 0, fmt.Errorf("cannot read the stream: %w", err)
	}
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(statusPrefix+"*"))
	if err != nil {
		return 0, fmt.Errorf("cannot read the stream: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, err
	}
	for subject := range info.State.Subjects {
		device := strings.TrimPrefix(subject, statusPrefix)
		if !isDevice(device) {
			continue // nobody's report: it would name a file
		}
		m, err := stream.GetLastMsgForSubject(ctx, subject)
		if err != nil {
			return devices, fmt.Errorf("cannot read the report of %s: %w", device, err)
		}
		if err := replace(filepath.Join(dir, device+".json"), m.Data); err != nil {
			return devices, err
		}
		devices++
	}
	return devices, nil
}

// isDevice holds a device's id against its grammar, [A-Za-z0-9_-]{1,64}: it
// becomes part of a subject and the name of a file.
func isDevice(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	return strings.IndexFunc(id, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '-')
	}) < 0
}

// replace puts b at path whole or not at all.
func replace(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// defaultSpool is where reports wait.
func defaultSpool() string {
	if runtime.GOOS == "windows" {
		if data := os.Getenv("ProgramData"); data != "" {
			return filepath.Join(data, "hotpatchd-nats", "spool")
		}
		return ""
	}
	return "/var/lib/hotpatchd-nats/spool"
}
