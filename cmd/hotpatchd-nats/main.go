// Command hotpatchd-nats stands beside the daemon where a fleet has NATS: it
// publishes the device's reports to a JetStream stream, and has the daemon look
// at its repository when a key of a bucket changes.
//
// It is a client of the daemon's control socket like any other, so that the
// daemon links nothing of NATS. What comes from the broker is a wake-up and
// nothing else: no value is read, nothing is applied or configured by it, and
// whoever owns the broker can make devices look sooner, at most once a minute,
// or see no reports. What a device then applies is signed in the repository.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"hotpatchd/agent/control"
	"hotpatchd/agent/report"
)

// Exit codes, the same for all commands of the project.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// version is set by the linker.
var version = "devel"

const usageText = `usage: hotpatchd-nats COMMAND --server URL [flags]
  run     publish this device's reports, and have the daemon look when told to
  setup   make the stream and the bucket, or bring them up to date
  look    have all devices look at their repository
  pull    write the newest report of each device to a file of --dir
  version
`

// settings are the flags of all commands.
type settings struct {
	server, creds, ca, cert, key string
	socket, spool, dir           string
	every, spread                time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(dispatch(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// dispatch is main without the process.
func dispatch(ctx context.Context, args []string, out, errOut io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(errOut, usageText)
		return exitUsage
	}
	run := map[string]func(context.Context, *settings, io.Writer, *slog.Logger) error{"run": runCommand, "setup": setupCommand, "look": lookCommand, "pull": pullCommand}[args[0]]
	switch {
	case args[0] == "version" || args[0] == "--version":
		fmt.Fprintf(out, "hotpatchd-nats %s\n", version)
		return exitDone
	case args[0] == "help" || args[0] == "-h" || args[0] == "--help":
		fmt.Fprint(out, usageText)
		return exitDone
	case run == nil:
		fmt.Fprintf(errOut, "hotpatchd-nats: there is no command %q\n%s", args[0], usageText)
		return exitUsage
	}
	s := &settings{}
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	f.SetOutput(errOut)
	f.StringVar(&s.server, "server", "", "the broker: tls://HOST:4222, more with commas; nats:// on this machine only")
	f.StringVar(&s.creds, "creds", "", "credentials file of NATS")
	f.StringVar(&s.ca, "ca", "", "PEM; trusted for the broker instead of the system's roots")
	f.StringVar(&s.cert, "cert", "", "PEM; certificate that is shown to the broker")
	f.StringVar(&s.key, "key", "", "PEM; its key")
	switch args[0] {
	case "run":
		f.StringVar(&s.socket, "socket", "", "the daemon's socket")
		f.StringVar(&s.spool, "spool", defaultSpool(), "folder where reports wait")
		f.DurationVar(&s.every, "every", time.Hour, "report at the latest after")
		f.DurationVar(&s.spread, "spread", 30*time.Second, "devices that are told to look come within")
	case "pull":
		f.StringVar(&s.dir, "dir", "", "folder for the reports")
	}
	if err := f.Parse(args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitDone
		}
		return exitUsage
	}
	if err := s.check(args[0], f.Args()); err != nil {
		fmt.Fprintf(errOut, "hotpatchd-nats: %v\n", err)
		return exitUsage
	}
	if err := run(ctx, s, out, slog.New(slog.NewTextHandler(errOut, nil))); err != nil {
		fmt.Fprintf(errOut, "hotpatchd-nats: %v\n", err)
		return exitFailed
	}
	return exitDone
}

// Bounds of the durations, as the daemon has them for [report] every.
const (
	leastEvery = time.Second
	mostEvery  = 24 * time.Hour
	mostSpread = 10 * time.Minute
)

func (s *settings) check(command string, rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("%s takes no argument %q", command, rest[0])
	case s.server == "":
		return errors.New("--server is missing")
	case (s.cert == "") != (s.key == ""):
		return errors.New("--cert and --key go together")
	case command == "run" && s.spool == "":
		return errors.New("--spool is missing")
	case command == "run" && (s.every < leastEvery || s.every > mostEvery):
		return fmt.Errorf("--every is %s to %s", leastEvery, mostEvery)
	case command == "run" && (s.spread < 0 || s.spread > mostSpread):
		return fmt.Errorf("--spread is 0s to %s", mostSpread)
	case command == "pull" && s.dir == "":
		return errors.New("--dir is missing")
	}
	_, err := s.encrypted()
	return err
}

func runCommand(ctx context.Context, s *settings, _ io.Writer, log *slog.Logger) error {
	spool, err := report.OpenSpool(s.spool, 0, 0)
	if err != nil {
		return err
	}
	nc, err := s.connect(log, nats.RetryOnFailedConnect(true))
	if err != nil {
		return err
	}
	defer nc.Close()
	client := control.Dial(s.socket)
	defer client.Close()
	b := &bridge{daemon: client, broker: nc, spool: spool, every: s.every, spread: s.spread, lookGap: lookGap, log: log}
	return b.run(ctx)
}

func setupCommand(ctx context.Context, s *settings, out io.Writer, log *slog.Logger) error {
	return s.once(ctx, log, func(ctx context.Context, js jetstream.JetStream) error {
		if err := setup(ctx, js); err != nil {
			return err
		}
		fmt.Fprintf(out, "stream %s takes %s*, bucket %s wakes by its key %s\n", streamName, statusPrefix, bucketName, lookKey)
		return nil
	})
}

func lookCommand(ctx context.Context, s *settings, out io.Writer, log *slog.Logger) error {
	return s.once(ctx, log, func(ctx context.Context, js jetstream.JetStream) error {
		if err := tellToLook(ctx, js); err != nil {
			return err
		}
		fmt.Fprintln(out, "devices that are connected look now, the others when they would have")
		return nil
	})
}

func pullCommand(ctx context.Context, s *settings, out io.Writer, log *slog.Logger) error {
	return s.once(ctx, log, func(ctx context.Context, js jetstream.JetStream) error {
		n, err := pull(ctx, js, s.dir)
		if err == nil {
			fmt.Fprintf(out, "%d devices; hotpatch-build fleet %s\n", n, s.dir)
		}
		return err
	})
}

// onceWait bounds a command of a person.
const onceWait = 5 * time.Minute

// once does one thing with the broker.
func (s *settings) once(ctx context.Context, log *slog.Logger, fn func(context.Context, jetstream.JetStream) error) error {
	ctx, cancel := context.WithTimeout(ctx, onceWait)
	defer cancel()
	nc, err := s.connect(log)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	return fn(ctx, js)
}
