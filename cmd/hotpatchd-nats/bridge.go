package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"hotpatchd/agent/control"
	"hotpatchd/agent/report"
)

const (
	// ackWait bounds one try to publish.
	ackWait = 10 * time.Second
	// againWait is the pause before the daemon or the bucket is tried again.
	againWait = 5 * time.Second
	// lookGap is the least time between two looks that the broker causes: who owns
	// it must not be able to make devices wear out their repository.
	lookGap = time.Minute
)

func random() float64 { return rand.Float64() }

// bridge stands between one daemon and the broker.
type bridge struct {
	daemon  *control.Client
	broker  *nats.Conn
	spool   *report.Spool
	every   time.Duration
	spread  time.Duration // devices that are woken together come within
	lookGap time.Duration
	pace    report.Pace // zero: report.Gentle
	log     *slog.Logger

	mu   sync.Mutex
	last string // error that was said last
}

// run works until ctx ends.
func (b *bridge) run(ctx context.Context) error {
	js, err := jetstream.New(b.broker)
	if err != nil {
		return err
	}
	device, err := b.device(ctx)
	if err != nil {
		return err
	}
	if device == "" { // ctx has ended
		return nil
	}
	r := &report.Reporter{
		Device: device, Every: b.every, Spool: b.spool, Pace: b.pace, Now: time.Now,
		Carrier: &stream{js: js, subject: statusPrefix + device},
		Make: func(ctx context.Context) (report.Made, error) {
			doc, err := b.daemon.Report(ctx)
			if err != nil {
				return report.Made{}, err
			}
			doc.Dropped = b.spool.Standing().Dropped
			text, err := doc.Encode(doc.Version, time.Now())
			return report.Made{Document: text, Key: doc.Key()}, err
		},
		Said: b.said,
	}
	var wg sync.WaitGroup
	for _, fn := range []func(){
		func() { r.Run(ctx) },
		func() { b.listen(ctx, r.Changed) },
		func() { b.watch(ctx, js, device) },
	} {
		wg.Add(1)
		go func() { defer wg.Done(); fn() }()
	}
	wg.Wait()
	return nil
}

// device waits for the daemon and asks for the device's id; "" if ctx ends before.
func (b *bridge) device(ctx context.Context) (string, error) {
	for {
		doc, err := b.daemon.Report(ctx)
		if err == nil {
			if id := doc.Status.Device.ID; isDevice(id) {
				return id, nil
			}
			return "", fmt.Errorf("this device has no id that could be a subject: %q", doc.Status.Device.ID)
		}
		if ctx.Err() == nil {
			b.say("the daemon does not answer", err)
		}
		if !sleep(ctx, againWait) {
			return "", nil
		}
	}
}

// listen tells changed of everything that the daemon tells.
func (b *bridge) listen(ctx context.Context, changed func()) {
	for {
		err := b.daemon.Events(ctx, changed, func(control.Event) error { changed(); return nil })
		if ctx.Err() != nil {
			return
		}
		b.say("no news of the daemon", err)
		changed()
		if !sleep(ctx, againWait) {
			return
		}
	}
}

// watch has the daemon look at its repository when the key of the bucket
// changes. What the key holds is never read.
func (b *bridge) watch(ctx context.Context, js jetstream.JetStream, device string) {
	told := make(chan struct{}, 1) // several orders become one
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Add(1)
	go func() { defer wg.Done(); b.look(ctx, told, device) }()
	for {
		err := b.watchOnce(ctx, js, told)
		if ctx.Err() != nil {
			return
		}
		b.say("the bucket cannot be watched", err)
		if !sleep(ctx, againWait) {
			return
		}
	}
}

func (b *bridge) watchOnce(ctx context.Context, js jetstream.JetStream, told chan<- struct{}) error {
	open, cancel := context.WithTimeout(ctx, ackWait)
	kv, err := js.KeyValue(open, bucketName)
	cancel()
	if err != nil {
		return err
	}
	w, err := kv.Watch(ctx, lookKey, jetstream.UpdatesOnly())
	if err != nil {
		return err
	}
	defer w.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.Updates():
			if !ok {
				return errors.New("the broker has ended the watch")
			}
			if e == nil {
				continue // the end of what was there before
			}
			select {
			case told <- struct{}{}:
			default:
			}
		}
	}
}

// look carries out what the bucket asks for, each device at its own place
// within the spread, and not too often.
func (b *bridge) look(ctx context.Context, told <-chan struct{}, device string) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-told:
		}
		if !sleep(ctx, report.Phase(device, "look", b.spread)) {
			return
		}
		if _, err := b.daemon.Check(ctx); err != nil && ctx.Err() == nil {
			b.say("the daemon does not look", err)
		}
		if !sleep(ctx, b.lookGap) {
			return
		}
	}
}

// said takes in the end of a try to report.
func (b *bridge) said(o report.Outcome) {
	switch o.Kind {
	case report.Refused:
		b.log.Warn("a report is dropped", "error", o.Err)
	case report.Failed:
		b.say("a report is not delivered, it is tried again", o.Err)
	default:
		b.mu.Lock()
		b.last = ""
		b.mu.Unlock()
	}
}

// say logs an error, not the same one over and over.
func (b *bridge) say(text string, err error) {
	text += ": " + fmt.Sprint(err)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last != text {
		b.last = text
		b.log.Warn(text)
	}
}

// stream is the Carrier that publishes to the stream.
type stream struct {
	js      jetstream.JetStream
	subject string
}

// Carry publishes a report once. It is delivered when the stream has it on
// disk, now or from a try whose answer was lost: that is what the id is for.
func (s *stream) Carry(ctx context.Context, e report.Entry) report.Outcome {
	ctx, cancel := context.WithTimeout(ctx, ackWait)
	defer cancel()
	_, err := s.js.PublishMsg(ctx, &nats.Msg{Subject: s.subject, Data: e.Document}, jetstream.WithMsgID(e.ID), jetstream.WithExpectStream(streamName))
	switch {
	case err == nil:
		return report.Outcome{Kind: report.Delivered}
	case errors.Is(err, nats.ErrMaxPayload):
		return report.Outcome{Kind: report.Refused, Err: err}
	}
	return report.Outcome{Kind: report.Failed, Err: fmt.Errorf("the broker: %w", err)}
}

// sleep waits; false: ctx has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
