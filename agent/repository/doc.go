// Package repository is both ends of release delivery: the publisher of a TUF
// repository (The Update Framework, specification 1.0) and the client that
// trusts nothing else.
//
// A repository is a folder of plain files on any web server, mirror or stick:
//
//	root.json                                  the root of trust that devices get with their config
//	metadata/N.root.json                       every root since the first
//	metadata/N.targets.json, N.snapshot.json   consistent snapshots
//	metadata/timestamp.json                    written last: it is the commit
//	targets/releases/SHA256.ID.hotpatch        the releases
//
// The client refuses rollback, freeze, mixed and endless data, and says which
// of them it met (Error.Code). Rules that go-tuf leaves to us, all kept here:
//
//   - The newest root ever trusted is kept by us and is where each refresh
//     starts; the root given with the config serves the first start only.
//     Else a revoked key would be good again for whoever hides newer roots.
//   - Versions never go back below the caller's Floors, also with an empty or
//     damaged cache. The floors live with the caller, apart from the cache.
//   - go-tuf sees no files: it gets bytes from our fetcher. Our cache is
//     written with fsync and rename, parsed and verified before use; a bad file
//     is set aside, never a reason to stop updating.
//   - Each refresh is a new updater, under recover, with bounded time, size
//     and slowness.
//
// Nothing here ever removes what was applied: a failed refresh returns an
// error, and Cached still returns the last verified catalog.
package repository
