package store

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// Bounds on what goes in. What is larger is a mistake, not a record.
const (
	MaxKey   = 1024     // bytes of a key
	MaxValue = 16 << 20 // bytes of a record or a setting
)

// Tx is one transaction: everything in it happens, or nothing.
type Tx struct{ tx *bbolt.Tx }

// Hold is the operator's "not this release".
type Hold struct {
	ID      string    `json:"id"`
	Product string    `json:"product"`
	By      string    `json:"by"`
	Since   time.Time `json:"since"`
	Reason  string    `json:"reason"`
}

// Install is a release that a person chose on this device.
type Install struct {
	ID      string    `json:"id"`
	Product string    `json:"product"`
	By      string    `json:"by"`
	Since   time.Time `json:"since"`
}

// FloorError is the refusal of a value below one seen before.
type FloorError struct {
	Name  string
	Floor int64 // the highest seen
	Value int64 // the one refused
}

func (e *FloorError) Error() string {
	return fmt.Sprintf("%s %d is below %d, which was seen before", e.Name, e.Value, e.Floor)
}

func (t *Tx) put(bucket []byte, key string, value []byte) error {
	if key == "" || len(key) > MaxKey {
		return fmt.Errorf("cannot store under a key of %d bytes (1 to %d)", len(key), MaxKey)
	}
	if len(value) > MaxValue {
		return fmt.Errorf("cannot store %q: %d bytes are more than %d", key, len(value), MaxValue)
	}
	return t.tx.Bucket(bucket).Put([]byte(key), value)
}

func (t *Tx) putJSON(bucket []byte, key string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return t.put(bucket, key, b)
}

func (t *Tx) delete(bucket []byte, key string) error {
	return t.tx.Bucket(bucket).Delete([]byte(key))
}

// get returns a copy: bolt's memory is valid within the transaction only.
func (t *Tx) get(bucket []byte, key string) ([]byte, bool) {
	v := t.tx.Bucket(bucket).Get([]byte(key))
	if v == nil {
		return nil, false
	}
	return append([]byte{}, v...), true
}

// PutRecord stores or replaces a record.
func (t *Tx) PutRecord(key string, value []byte) error { return t.put(bucketRecords, key, value) }

// DeleteRecord removes a record; one that is not there is no error.
func (t *Tx) DeleteRecord(key string) error { return t.delete(bucketRecords, key) }

// Record returns one record.
func (t *Tx) Record(key string) ([]byte, bool) { return t.get(bucketRecords, key) }

// Records returns all records.
func (t *Tx) Records() (map[string][]byte, error) {
	all := map[string][]byte{}
	err := t.tx.Bucket(bucketRecords).ForEach(func(k, v []byte) error {
		all[string(k)] = append([]byte{}, v...)
		return nil
	})
	return all, err
}

// PutHold stores or replaces the hold on h.ID.
func (t *Tx) PutHold(h Hold) error { return t.putJSON(bucketHolds, h.ID, h) }

// DeleteHold lifts a hold; one that is not there is no error.
func (t *Tx) DeleteHold(id string) error { return t.delete(bucketHolds, id) }

// Holds returns all holds by release id.
func (t *Tx) Holds() (map[string]Hold, error) { return decodeAll[Hold](t, bucketHolds) }

// PutInstalled remembers that a person chose the release.
func (t *Tx) PutInstalled(i Install) error { return t.putJSON(bucketInstalled, i.ID, i) }

// DeleteInstalled forgets it.
func (t *Tx) DeleteInstalled(id string) error { return t.delete(bucketInstalled, id) }

// Installed returns all releases that persons chose, by id.
func (t *Tx) Installed() (map[string]Install, error) { return decodeAll[Install](t, bucketInstalled) }

func decodeAll[T any](t *Tx, bucket []byte) (map[string]T, error) {
	all := map[string]T{}
	err := t.tx.Bucket(bucket).ForEach(func(k, v []byte) error {
		var x T
		if err := json.Unmarshal(v, &x); err != nil {
			return fmt.Errorf("%s %q: %w", bucket, k, err)
		}
		all[string(k)] = x
		return nil
	})
	return all, err
}

// Floors returns the highest value seen under each name.
func (t *Tx) Floors() (map[string]int64, error) {
	all := map[string]int64{}
	err := t.tx.Bucket(bucketFloors).ForEach(func(k, v []byte) error {
		n, err := floorValue(v)
		if err != nil {
			return fmt.Errorf("floor %q: %w", k, err)
		}
		all[string(k)] = n
		return nil
	})
	return all, err
}

// RaiseFloor lifts the floor of name to value, or fails with *FloorError if a
// higher value was seen before. There is no way to lower a floor.
func (t *Tx) RaiseFloor(name string, value int64) error {
	if value < 0 {
		return fmt.Errorf("cannot take %d as a floor of %s: negative", value, name)
	}
	if v, ok := t.get(bucketFloors, name); ok {
		old, err := floorValue(v)
		if err != nil {
			return fmt.Errorf("floor %q: %w", name, err)
		}
		if value < old {
			return &FloorError{Name: name, Floor: old, Value: value}
		}
		if value == old {
			return nil
		}
	}
	return t.put(bucketFloors, name, binary.BigEndian.AppendUint64(nil, uint64(value)))
}

func floorValue(v []byte) (int64, error) {
	if len(v) != 8 || v[0]&0x80 != 0 {
		return 0, errors.New("not a floor")
	}
	return int64(binary.BigEndian.Uint64(v)), nil
}

const keyPaused = "paused"

// SetPaused stores the operator's pause.
func (t *Tx) SetPaused(paused bool) error {
	if !paused {
		return t.delete(bucketMeta, keyPaused)
	}
	return t.put(bucketMeta, keyPaused, []byte{1})
}

// Paused tells whether the operator has paused the daemon.
func (t *Tx) Paused() bool {
	_, ok := t.get(bucketMeta, keyPaused)
	return ok
}

// Set stores a small setting; nil removes it.
func (t *Tx) Set(key string, value []byte) error {
	if value == nil {
		return t.delete(bucketSettings, key)
	}
	return t.put(bucketSettings, key, value)
}

// Get returns a setting.
func (t *Tx) Get(key string) ([]byte, bool) { return t.get(bucketSettings, key) }
