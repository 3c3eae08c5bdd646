package repository

import (
	"errors"
	"slices"
)

// Import is Refresh from an export instead of the network: the same checks,
// from the same root, with the same floors, which it raises; the catalog is the
// one known from then on. held are the offers whose bytes came along, and stay
// in the cache. On error nothing has changed, but for a newer root and higher
// floors where those were verified before the failure.
func (c *Client) Import(b []byte) (catalog *Catalog, held []Offer, err error) {
	c.refreshing.Lock()
	defer c.refreshing.Unlock()
	c.transport.time.forget()
	set, s, files, err := verifyExport(c.Root(), b, c.cfg.Now())
	return c.bring(set, s, files, err)
}

// ImportFile is Import for one release and the files of the metadata folder
// that lay beside it, by name.
func (c *Client) ImportFile(metadata map[string][]byte, file []byte) (*Catalog, []Offer, error) {
	c.refreshing.Lock()
	defer c.refreshing.Unlock()
	c.transport.time.forget()
	set, s, err := verify(c.Root(), filesSource(metadata), c.cfg.Now())
	files := map[string][]byte{}
	if err == nil {
		var offers []Offer
		if offers, _, err = readOffers(set.targets.Signed.Targets); err == nil {
			var o Offer
			if o, err = find(offers, file); err == nil {
				files[o.ID] = file
			}
		}
	}
	return c.bring(set, s, files, err)
}

// bring takes over what an export or a folder brought.
func (c *Client) bring(set *trustedSet, s *session, files map[string][]byte, err error) (*Catalog, []Offer, error) {
	if c.known() == nil {
		// Versions that verified once are floors, also where the caller lost his.
		if kept, _, kerr := c.cache.load(c.Root()); kerr == nil {
			c.raise(kept)
		}
	}
	catalog, err := c.accept(set, s, err)
	var why *Error
	if errors.As(err, &why) && why.Code == CodeExpired {
		return nil, nil, fail(CodeExpired, err, "%s", why.Text).hint("bring a newer export: hotpatch-build refresh, then export; %s", hintStays)
	}
	if errors.As(err, &why) && why.Code == CodeRollback {
		return nil, nil, fail(CodeRollback, err, "%s", why.Text).hint("bring the newest export of this repository; %s", hintStays)
	}
	if err != nil {
		return nil, nil, err
	}
	c.fetching.Lock()
	defer c.fetching.Unlock()
	var held []Offer
	for _, o := range catalog.Offers {
		b, ok := files[o.ID]
		if !ok {
			continue
		}
		if err := writeFile(c.cache.target(o.SHA256), b, 0o600); err != nil {
			return nil, nil, storage(err)
		}
		held = append(held, o)
	}
	return catalog, slices.Clip(held), nil
}
