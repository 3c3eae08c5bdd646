package repository

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/theupdateframework/go-tuf/v2/metadata"
)

// Config is what a client needs to know.
type Config struct {
	URL         string // file://, http:// or https://: the folder that holds metadata/ and targets/; "": none, all comes by Import
	Dir         string // the cache; of this client alone
	InitialRoot []byte // root.json as it came with the config
	Proxy       string // address of a proxy, "" for none
	CAFile      string // PEM, trusted besides the system's
	ClientCert  string // PEM, certificate and key in one file
	Floors      Floors
	Now         func() time.Time
	// Progress is told how far a release has come, in bytes; may be nil.
	Progress func(done, total int64)
	// Notice is told what an auditor should see, such as a damaged file set
	// aside; may be nil.
	Notice func(text string)
}

// Client fetches and verifies. Safe for concurrent use: refreshes wait for
// refreshes and downloads for downloads; what is known can be asked for at any time.
type Client struct {
	cfg       Config
	transport *transport
	cache     *cache

	refreshing sync.Mutex // held while the network is asked for metadata
	fetching   sync.Mutex // held while it is asked for releases

	mu      sync.Mutex // all below; never held while waiting
	root    []byte     // newest ever trusted
	floors  Floors
	catalog *Catalog // last verified, nil before the first
}

// Catalog is what one verified set of metadata offers.
type Catalog struct {
	Offers     []Offer // by target name
	Skipped    []Skipped
	Expires    time.Time // the earliest end of the metadata
	ExpiresIn  string    // the file that ends then
	Floors     Floors
	NewestRoot []byte
	// Doubt is why this device's clock cannot be right although the metadata
	// verified by it: CodeClock. nil if nothing speaks against it.
	Doubt *Error
}

// Ended tells whether the metadata has ended at now. Nothing new may be
// applied from an ended catalog; what is applied stays.
func (c *Catalog) Ended(now time.Time) bool { return now.After(c.Expires) }

// New opens or makes the cache in cfg.Dir. It reads no network. A damaged
// cache is set aside; a root of trust or settings that cannot work are errors.
func New(cfg Config) (*Client, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Notice == nil {
		cfg.Notice = func(string) {}
	}
	t, err := newTransport(&cfg, sane)
	if err != nil {
		return nil, err
	}
	c, err := openCache(cfg.Dir, cfg.Notice)
	if err != nil {
		return nil, err
	}
	root, err := c.root(cfg.InitialRoot)
	if err != nil {
		return nil, err
	}
	return &Client{cfg: cfg, transport: t, cache: c, root: root, floors: cfg.Floors}, nil
}

// Floors are the highest versions verified so far, by this client or before.
// They may have grown although Refresh failed: keep them either way.
func (c *Client) Floors() Floors {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.floors
}

// Root is the newest root ever trusted.
func (c *Client) Root() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.root
}

// Refresh asks the repository for newer metadata and returns what it offers
// now. On error everything stays as it was, but for a newer root and higher
// floors where those were verified before the failure. Errors are *Error.
func (c *Client) Refresh(ctx context.Context) (*Catalog, error) {
	c.refreshing.Lock()
	defer c.refreshing.Unlock()
	c.transport.time.forget()
	root := c.Root() // changed by refreshes only
	kept, keptFiles, err := c.cache.load(root)
	switch {
	case err == nil:
		// Versions that verified once are floors, even where the caller lost his.
		c.raise(kept)
	case CodeOf(err) == CodeStorage:
		return nil, err
	default:
		keptFiles = nil
	}
	set, s, err := verify(root, c.source(ctx, keptFiles), c.cfg.Now())
	if keptFiles != nil && s.reused(keptFiles) && slices.Contains([]string{CodeSignature, CodeMixed, CodeDamaged}, CodeOf(err)) {
		// A kept file may differ from one published again under its version.
		set, s, err = verify(root, c.source(ctx, nil), c.cfg.Now())
	}
	return c.accept(set, s, err)
}

// raise lifts the floors to what verified.
func (c *Client) raise(set *trustedSet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.floors = c.floors.raise(set)
}

// accept takes over what a session verified, as far as it is not older than
// what was trusted before.
func (c *Client) accept(set *trustedSet, s *session, err error) (*Catalog, error) {
	if set.root == nil {
		return nil, err
	}
	floors := c.Floors()
	if err != nil && set.timestamp == nil && set.root.Signed.Version < floors.Root {
		return nil, err // the newer roots may yet come: not reached is not rolled back
	}
	if rollback := floors.check(set); rollback != nil {
		return nil, rollback
	}
	var expired *Error
	if errors.As(err, &expired) && expired.Code == CodeExpired {
		_, ended := s.expired(set)
		err = c.transport.time.explain(expired, ended, s.at)
	}
	if set.root.Signed.Version > floors.Root || string(set.rootBytes) != string(c.Root()) {
		if err := writeFile(c.cache.rootPath(), set.rootBytes, 0o600); err != nil {
			return nil, storage(err)
		}
	}
	c.mu.Lock()
	c.root = set.rootBytes
	c.floors = c.floors.raise(set)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	catalog, err := c.read(set)
	if err != nil {
		return nil, err
	}
	if err := c.cache.keep(set, s); err != nil {
		return nil, err
	}
	catalog.Doubt = catalog.doubt(&c.transport.time, s.at)
	c.know(catalog)
	return catalog, nil
}

// know makes catalog the last verified one.
func (c *Client) know(catalog *Catalog) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.catalog = catalog
}

// known is the last verified catalog of this process, nil before the first.
func (c *Client) known() *Catalog {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.catalog
}

// source asks the network, but for versioned files that are kept already.
func (c *Client) source(ctx context.Context, kept *session) source {
	return func(name string, limit int64) ([]byte, error) {
		if kept != nil && name != "timestamp.json" {
			if b, ok := kept.got[name]; ok {
				return b, nil
			}
		}
		return c.transport.document(ctx, name, limit)
	}
}

// reused tells whether s was fed from what was kept.
func (s *session) reused(kept *session) bool {
	for name := range s.got {
		if _, ok := kept.got[name]; ok && name != "timestamp.json" {
			return true
		}
	}
	return false
}

// read makes a catalog of a complete set.
func (c *Client) read(set *trustedSet) (*Catalog, error) {
	offers, skipped, err := readOffers(set.targets.Signed.Targets)
	if err != nil {
		return nil, err
	}
	end, name := set.ends()
	return &Catalog{Offers: offers, Skipped: skipped, Expires: end, ExpiresIn: name, Floors: c.Floors(), NewestRoot: set.rootBytes}, nil
}

// Cached returns the last verified catalog without network, also when it has
// ended (Catalog.Expires tells). It does not wait for a refresh under way.
func (c *Client) Cached() (*Catalog, error) {
	if known := c.known(); known != nil {
		return known, nil
	}
	set, _, err := c.cache.load(c.Root())
	if known := c.known(); known != nil {
		return known, nil // a refresh was faster, and its files are others
	}
	if err != nil {
		return nil, err
	}
	if floor := c.Floors().Root; set.root.Signed.Version < floor {
		return nil, fail(CodeRollback, &metadata.ErrBadVersionNumber{Msg: "root.json"},
			"the newest root kept here has version %d, but this device has trusted version %d: the repository has to be reached first", set.root.Signed.Version, floor)
	}
	c.raise(set)
	catalog, err := c.read(set)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.catalog == nil {
		c.catalog = catalog
	}
	return c.catalog, nil
}
