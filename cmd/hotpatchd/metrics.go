package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"hotpatchd/agent"
)

const (
	// textfileEvery is how often the file for a textfile collector is written;
	// collectors read about as often.
	textfileEvery = 15 * time.Second
	// metricsWait bounds one question for metrics, and one answer to a collector.
	metricsWait = 5 * time.Second
)

// helpers are goroutines that are waited for.
type helpers struct{ wg sync.WaitGroup }

func (h *helpers) start(fn func()) {
	h.wg.Add(1)
	go func() { defer h.wg.Done(); fn() }()
}

func (h *helpers) wait() { h.wg.Wait() }

// exposeMetrics serves or writes metrics where the configuration wants them
// besides the control socket. Everyone on the machine can read either; the
// agent's metrics count and name nobody.
func exposeMetrics(ctx context.Context, c *agent.Config, h heart, log *zap.Logger) {
	var both helpers
	if address := c.Metrics.Listen; address != "" {
		both.start(func() {
			if err := serveMetrics(ctx, address, h); err != nil {
				log.Error("no metrics by network", zap.String("listen", address), zap.Error(err))
			}
		})
	}
	if file := c.Metrics.Textfile; file != "" {
		both.start(func() { writeMetrics(ctx, file, h, log) })
	}
	both.wait()
}

func serveMetrics(ctx context.Context, address string, h heart) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	server := &http.Server{
		ReadTimeout: metricsWait, WriteTimeout: 2 * metricsWait, IdleTimeout: time.Minute, MaxHeaderBytes: 4096,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || r.URL.Path != "/metrics" {
				http.NotFound(w, r)
				return
			}
			answer, cancel := context.WithTimeout(r.Context(), metricsWait)
			defer cancel()
			text, err := h.Metrics(answer)
			if err != nil {
				http.Error(w, "no metrics", http.StatusServiceUnavailable)
				return
			}
			w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
			w.Write(text)
		}),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// writeMetrics replaces the file again and again, and says once when it cannot.
func writeMetrics(ctx context.Context, file string, h heart, log *zap.Logger) {
	t := time.NewTicker(textfileEvery)
	defer t.Stop()
	well := true
	for {
		answer, cancel := context.WithTimeout(ctx, metricsWait)
		err := h.WriteMetrics(answer, file)
		cancel()
		if err != nil && well && ctx.Err() == nil {
			log.Warn("no metrics in the text file", zap.String("file", file), zap.Error(err))
		}
		well = err == nil
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}
