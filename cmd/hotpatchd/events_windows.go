package main

import (
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/windows/svc/eventlog"
)

// Ids of events in the Application log, source "hotpatchd". They are a contract:
// collectors filter by them. Everything else is in the log file only.
var eventIDs = map[string]uint32{
	"watching":                       1, // started
	"stopped; what is applied stays": 2,
	"cannot go on":                   3,
	"the loop does not answer":       4,
	"release in force":               10,
	"no release in force":            11,
	"release refused":                12,
	"eligibility changed":            20,
	"policy read":                    21,
	"policy refused, the last good one stays in force": 22,
	"memory is not as recorded":                        30,
	"the state was damaged":                            31,
	"the state cannot be written":                      32,
}

// otherError is the id of errors that have none of their own.
const otherError = 99

// maxEvent bounds an event's text, in bytes; the system's own bound is 31839 characters.
const maxEvent = 8 << 10

// Of events of one text at most eventBurst are written in an eventPeriod, and
// then one in eventRest: a fault that repeats must not push all else out.
const (
	eventPeriod = 10 * time.Minute
	eventBurst  = 10
	eventRest   = 1000
)

// reporterOfEvents is the part of eventlog.Log that is used.
type reporterOfEvents interface {
	Info(id uint32, text string) error
	Warning(id uint32, text string) error
	Error(id uint32, text string) error
}

// eventCore writes what has an id, and all errors, as events.
type eventCore struct {
	to   reporterOfEvents
	text zapcore.Encoder
}

func newEventCore(to reporterOfEvents) zapcore.Core {
	c := zapcore.EncoderConfig{MessageKey: "msg", ConsoleSeparator: " ", LineEnding: "\n",
		EncodeTime: zapcore.RFC3339TimeEncoder, EncodeDuration: zapcore.StringDurationEncoder}
	return zapcore.NewSamplerWithOptions(&eventCore{to, zapcore.NewConsoleEncoder(c)}, eventPeriod, eventBurst, eventRest)
}

func (c *eventCore) Enabled(l zapcore.Level) bool { return l >= zapcore.InfoLevel }

func (c *eventCore) With(fields []zapcore.Field) zapcore.Core {
	text := c.text.Clone()
	for _, f := range fields {
		f.AddTo(text)
	}
	return &eventCore{c.to, text}
}

func (c *eventCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if _, named := eventIDs[e.Message]; named || e.Level >= zapcore.ErrorLevel {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *eventCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	b, err := c.text.EncodeEntry(e, fields)
	if err != nil {
		return err
	}
	defer b.Free()
	text := strings.TrimSpace(strings.ReplaceAll(b.String(), "\x00", ""))
	if len(text) > maxEvent {
		text = strings.ToValidUTF8(text[:maxEvent], "")
	}
	id, named := eventIDs[e.Message]
	if !named {
		id = otherError
	}
	switch {
	case e.Level >= zapcore.ErrorLevel:
		return c.to.Error(id, text)
	case e.Level == zapcore.WarnLevel:
		return c.to.Warning(id, text)
	}
	return c.to.Info(id, text)
}

func (c *eventCore) Sync() error { return nil }

// withEvents writes the few entries that matter to the event log too. Where it
// cannot be reached, the log file says so.
func withEvents(log *zap.Logger) *zap.Logger {
	to, err := eventlog.Open(serviceName)
	if err != nil {
		log.Warn("no event log", zap.Error(err))
		return log
	}
	return log.WithOptions(zap.WrapCore(func(core zapcore.Core) zapcore.Core { return zapcore.NewTee(core, newEventCore(to)) }))
}
