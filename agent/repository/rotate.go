package repository

import (
	"errors"
	"fmt"
	"slices"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Rotate replaces the key of a role by fresh, a new one that is kept already:
// because the old one may be known to others, or because it is old. keys are
// the present ones: root's always; for root alone nothing else, for targets all four,
// for snapshot and timestamp all but targets'.
//
// It takes two new roots, each signed by the keys of the one before: under the
// first both keys count, then what the role signs is signed by both, under the
// second only the new one counts. So clients, and the next publisher after a
// crash, find a repository that verifies at any moment.
func Rotate(dir string, keys Keys, role string, fresh Keys, opts PublishOptions) (Result, error) {
	if !slices.Contains(Roles, role) || len(fresh) != 1 || len(fresh[role]) != 1 {
		return Result{}, fmt.Errorf("cannot rotate %q: one new key for one of %q is needed", role, Roles)
	}
	p, unlock, err := open(dir, keys, opts, false)
	if err != nil {
		return Result{}, err
	}
	defer unlock()
	if n := p.set.root.Signed.Roles[role].Threshold; n != 1 {
		return Result{}, fmt.Errorf("%s.json needs %d signatures: the keys of a role with several holders cannot be replaced here", role, n)
	}
	old := slices.Clone(p.set.root.Signed.Roles[role].KeyIDs)
	k, id, err := tufKey(fresh[role][0])
	if err != nil {
		return Result{}, err
	}
	if slices.Contains(old, id) {
		return Result{}, errors.New("the new key is one that root.json names already")
	}
	p.keys = Keys{}
	for r, list := range keys {
		p.keys[r] = slices.Clone(list)
	}
	p.keys[role] = append(p.keys[role], fresh[role][0])

	if err := p.nextRoot(func(root *metadata.RootType) error { return root.AddKey(k, role) }); err != nil {
		return Result{}, err
	}
	if role != metadata.ROOT {
		if _, err := p.finish(role == metadata.TARGETS); err != nil {
			return Result{}, err
		}
	}
	err = p.nextRoot(func(root *metadata.RootType) error {
		for _, o := range old {
			if err := root.RevokeKey(o, role); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Result{}, err
	}
	p.res.Changed = true
	p.res.Warnings = []string{}
	return p.report(), nil
}

// nextRoot makes the root after the present one, which must have signed it.
func (p *publisher) nextRoot(change func(*metadata.RootType) error) error {
	before, err := metadata.Root().FromBytes(p.set.rootBytes)
	if err != nil {
		return err
	}
	root := p.set.root
	if err := change(&root.Signed); err != nil {
		return err
	}
	root.Signed.Version++
	root.Signed.Expires = p.opts.Now.Add(longExpires)
	if err := sign(root, metadata.ROOT, root, p.keys); err != nil {
		return err
	}
	if err := before.VerifyDelegate(metadata.ROOT, root); err != nil {
		return fmt.Errorf("a new root.json needs the key of the present one, root.pem: %w", err)
	}
	return p.writeRoot()
}
