package control

import (
	"fmt"
	"time"
)

// Span is a time span for people, in up to two units.
func Span(d time.Duration) string {
	d = max(d, 0).Truncate(time.Second)
	unit := func(n int, one, many string) string {
		if n == 1 {
			return "1 " + one
		}
		return fmt.Sprintf("%d %s", n, many)
	}
	two := func(a string, n int, name string) string {
		if n == 0 {
			return a
		}
		return a + " " + unit(n, name, name)
	}
	switch {
	case d < time.Minute:
		return unit(int(d.Seconds()), "s", "s")
	case d < time.Hour:
		return two(unit(int(d.Minutes()), "min", "min"), int(d.Seconds())%60, "s")
	case d < 24*time.Hour:
		return two(unit(int(d.Hours()), "h", "h"), int(d.Minutes())%60, "min")
	case d < 48*time.Hour:
		return two("1 day", int(d.Hours())%24, "h")
	}
	return unit(int(d.Hours()/24), "day", "days")
}
