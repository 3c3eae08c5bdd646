// Package calendar is the servicing rhythm: a baseline with a restart in the
// first month of each quarter, hotpatches in the two months between. It tells
// what a day brings by rule, and what a device is offered from what was published.
//
// It is pure: no clock, no I/O; time is a parameter. The rules are those of
// Microsoft's release calendar for hotpatch
// (learn.microsoft.com/windows/release-health and .../windows-autopatch): they
// hold for any vendor who labels releases with a month and a kind.
//
//   - Planned releases come on the second Tuesday of the month, 10:00 Pacific.
//   - January, April, July and October bring a baseline, the other months a hotpatch.
//   - An unplanned baseline takes the place of a planned hotpatch. The cadence never shifts.
//   - An out-of-band hotpatch is one more on the same baseline.
//   - An update with a restart that is no baseline, or an out-of-band baseline,
//     takes who installs it off the track until the next baseline. Devices on the track are not offered one.
//   - A device behind the baseline is not offered hotpatches.
//   - A version upgrade in a baseline month stays on the track; one in a hotpatch
//     month leaves it until the next baseline.
package calendar
