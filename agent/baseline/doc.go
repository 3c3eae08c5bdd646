// Package baseline puts whole files of a release in the place of older ones, at
// a restart of the device: all of them or none.
//
// A set of files is staged: each new file is written beside its destination,
// under a name of ours, with the owner, mode and extended attributes of the file
// it will replace, and is on the disk before the set counts as staged. At the
// first start after a new boot the files take the places of the old ones by
// rename, which needs no room and cannot be half done; the old ones are kept
// under names of ours until the set has proved itself, and can take effect again
// at a further restart.
//
// One journal file a product says what is under way, durable before each
// effect. Whatever ends us, a crash, SIGKILL or a power cut: Recover, called
// before anything else, carries the work through or takes it back, so that all
// files of a set are new or all are old.
//
// On Windows the system moves the files (MoveFileEx until reboot), because a
// file in use cannot be replaced there; see Mover.
//
// The package knows files only: no processes, no releases, no clock, no log.
// What it must never do: write outside a destination and names of ours beside
// it, replace a content that the author did not name, or restart anything.
package baseline
