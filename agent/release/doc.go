// Package release turns the bytes of a release into values and back: the
// manifest release.json, and the container that holds it and the images.
//
// A release is one numbered delivery: hotpatch images (kind "hotpatch"), or
// whole files (kind "baseline"). Its container is a zip file named
// ID.hotpatch whose first entry is release.json. The bytes are deterministic:
// the same manifest and files give the same container, always.
//
// Nothing here decides whether a release is genuine. Open is for bytes whose
// length and hash signed metadata has named; it parses strictly all the same,
// because signed is not the same as well-made: every count and size is capped,
// each name and hash is checked, and what the format does not name is refused.
// The package is pure: bytes and an fs.FS in, values out.
package release
