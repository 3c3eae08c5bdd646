// Package probe collects the facts that eligibility judges: from the operating
// system it runs on, or from a file that describes a simulated device.
//
// It reads; it changes nothing, starts nothing and asks no network. What cannot
// be read becomes a fact that is not known, with the reason: no function here
// fails because one fact is missing.
package probe

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"hotpatchd/eligibility"
)

// Device names the device in status documents.
type Device struct {
	OS      string // "Windows 11", "Linux"
	Arch    string // of the machine: "amd64"
	Build   string // "26100.7092"; on Linux the kernel release
	Edition string // "Enterprise"; on Linux the distribution's own name
	ID      string // see DeviceID; "" where there is none
}

// Describe takes the device's name from its facts. What is not known is empty.
func Describe(f eligibility.Facts, id string) Device {
	value := func(id eligibility.ID) string {
		if !f[id].Known {
			return ""
		}
		return f[id].Value
	}
	return Device{
		OS: value(eligibility.OS), Arch: value(eligibility.Arch), Build: value(eligibility.Version),
		Edition: value(eligibility.Edition), ID: id,
	}
}

// idPrefix makes the hash ours: another program that hashes the same machine id
// gets another result, and neither can be turned back (machine-id(5) asks for
// exactly this).
const idPrefix = "hotpatchd device id 1\x00"

// hashID turns the machine's own id into the device id: 64 hexadecimal digits.
func hashID(machine string) string {
	sum := sha256.Sum256([]byte(idPrefix + machine))
	return hex.EncodeToString(sum[:])
}

// machineID checks the text of a machine id: 32 hexadecimal digits, dashes (as
// in a MachineGuid) left out, not all the same.
func machineID(text string) (string, error) {
	id := strings.ToLower(strings.ReplaceAll(strings.TrimSpace(text), "-", ""))
	if _, err := hex.DecodeString(id); err != nil || len(id) != 32 {
		return "", fmt.Errorf("it is not 32 hexadecimal digits")
	}
	if strings.Count(id, id[:1]) == len(id) {
		return "", fmt.Errorf("it was never set")
	}
	return id, nil
}
