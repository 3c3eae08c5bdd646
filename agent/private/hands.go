package private

import "fmt"

// SIDs as Windows writes them ("Well-known SIDs" in Microsoft's documentation).
const (
	sidSystem           = "S-1-5-18"
	sidAdministrators   = "S-1-5-32-544"
	sidTrustedInstaller = "S-1-5-80-956008885-3418522649-1831038044-1853292631-2271478464" // owns what came with Windows
	sidCreatorOwner     = "S-1-3-0"                                                        // in what is made below: whoever makes it
	sidOwnerRights      = "S-1-3-4"                                                        // the owner, who is judged as such
)

// Rights on a file or folder with which it, or what is in it, can be made to
// say something else (winnt.h). The first two are to add files and folders in a folder.
const (
	rightWriteData   = 0x2
	rightAppendData  = 0x4
	rightDeleteChild = 0x40
	rightDelete      = 0x10000
	rightWriteDAC    = 0x40000
	rightWriteOwner  = 0x80000
	rightGenericAll  = 0x10000000
	rightGenericWrit = 0x40000000

	commanding = rightWriteData | rightAppendData | rightDeleteChild | rightDelete | rightWriteDAC | rightWriteOwner | rightGenericAll | rightGenericWrit
)

// Kinds and flags of an entry in a DACL (winnt.h).
const (
	aceAllowed         = 0
	aceDenied          = 1
	aceAllowedCallback = 9 // allowed under a condition, which is taken as met
	aceDeniedCallback  = 10
	aceInheritOnly     = 0x8
)

// descriptor is what is judged of a security descriptor.
type descriptor struct {
	owner   string // SID
	noDACL  bool   // everybody may do everything
	entries []entry
}

type entry struct {
	kind, flags byte
	rights      uint32
	sid         string
}

// judge tells who but SYSTEM, Administrators, Windows itself and who owns the
// thing or may write to it; "" is nobody. What is denied to somebody takes
// nothing back: who may write is then told who in fact may not.
func judge(d descriptor, who ...string) string {
	trusted := map[string]bool{sidSystem: true, sidAdministrators: true, sidTrustedInstaller: true}
	for _, sid := range who {
		trusted[sid] = sid != ""
	}
	if !trusted[d.owner] {
		return "it belongs to " + named(d.owner)
	}
	if d.noDACL {
		return "everybody may write to it"
	}
	trusted[sidCreatorOwner], trusted[sidOwnerRights] = true, true
	for _, e := range d.entries {
		switch {
		case e.kind == aceDenied || e.kind == aceDeniedCallback || e.flags&aceInheritOnly != 0:
		case e.kind != aceAllowed && e.kind != aceAllowedCallback:
			return fmt.Sprintf("it has an entry of rights of the unknown kind %d", e.kind)
		case e.rights&commanding != 0 && !trusted[e.sid]:
			return fmt.Sprintf("%s may write to it (rights %#x)", named(e.sid), e.rights)
		}
	}
	return ""
}

// named is an SID with the name that everybody knows it by.
func named(sid string) string {
	name := map[string]string{"S-1-1-0": "Everyone", "S-1-5-11": "Authenticated Users", "S-1-5-32-545": "Users", "S-1-5-4": "INTERACTIVE", "": "nobody"}[sid]
	if name == "" {
		return sid
	}
	return name
}
