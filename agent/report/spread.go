package report

import (
	"crypto/sha256"
	"encoding/binary"
	"time"
)

// Phase is the device's own place in an interval, 0 <= Phase < interval: the
// same at every call and spread evenly over a fleet. purpose sets the phases of
// different work of one device apart. 0 for an interval of no length.
func Phase(device, purpose string, interval time.Duration) time.Duration {
	if interval <= 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(purpose + "\x00" + device))
	// 53 bits are exact in a float64, and the product stays below interval.
	share := float64(binary.BigEndian.Uint64(sum[:8])>>11) / (1 << 53)
	return min(time.Duration(share*float64(interval)), interval-1)
}

// NextTurn is the first of the device's times that is at least half an interval
// after now: its times are an interval apart, and lie at its Phase on the clock.
func NextTurn(device, purpose string, interval time.Duration, now time.Time) time.Time {
	if interval <= 0 {
		return now
	}
	earliest := now.Add(interval / 2)
	// Truncate counts from the zero time, alike on every device.
	turn := earliest.Truncate(interval).Add(Phase(device, purpose, interval))
	if turn.Before(earliest) {
		turn = turn.Add(interval)
	}
	return turn
}
