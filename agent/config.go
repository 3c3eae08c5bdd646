package agent

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"hotpatchd/agent/control"
	"hotpatchd/eligibility"
)

// ConfigFormat is the first key of a configuration file.
const ConfigFormat = "hotpatchd-config/1"

// Bounds of the durations in the configuration.
const (
	minCheckEvery = time.Second    // not below: one slow server must not become our whole work
	maxCheckEvery = 24 * time.Hour // not above: a freeze of the repository must show within a day
	minScanEvery  = 50 * time.Millisecond
	maxScanEvery  = 10 * time.Minute // a process start nobody told us of waits this long at most
	// A report is some kilobytes: a fleet that sends one a second is its owner's wish, and none a day is none.
	minReportEvery = time.Second
	maxReportEvery = 24 * time.Hour
)

// maxSocket is the longest path that fits a Unix socket's address (sun_path, unix(7)).
const maxSocket = 107

// maxGlobs bounds each list of patterns.
const maxGlobs = 1000

// Config is the configuration of the daemon: what device management or the
// installer sets once. What the owner changes from day to day is the Policy.
// All paths are absolute.
type Config struct {
	File     string // where it was read, "" for defaults
	StateDir string // records, history, TUF cache

	Control     ControlConfig
	Repository  RepositoryConfig
	Backend     BackendConfig
	Eligibility EligibilityConfig
	Policy      PolicyConfig
	Metrics     MetricsConfig
	Report      ReportConfig
}

// ControlConfig is where operators reach the daemon.
type ControlConfig struct {
	Socket string // path of a Unix socket, or a Windows pipe (\\.\pipe\NAME)
	Group  string // members may change things; "" = root and Administrators only
}

// RepositoryConfig is where releases come from and which are wanted.
type RepositoryConfig struct {
	URL        string // https://… or file:///…, http:// on loopback only; "" = none, releases come as files
	Root       string // the first root of trust, root.json
	CheckEvery time.Duration
	Proxy      string // URL of a proxy; "" = none
	CAFile     string // PEM; trusted for the server besides the system's roots; "" = those only
	ClientCert string // PEM with certificate and key that the daemon shows the server; "" = none
	Products   []Glob // releases of other products are out of scope
	Images     []Glob // images of other names are out of scope
}

// BackendConfig is how processes are reached.
type BackendConfig struct {
	Name      string // "auto", "ptrace", "win32", "sim"
	Scene     string // the simulated machine, for "sim" only
	ScanEvery time.Duration
}

// EligibilityConfig is by which rules the device is judged.
type EligibilityConfig struct {
	Profile string // "auto" or a profile of package eligibility
	Facts   string // facts of a simulated device, for backend "sim" only; "" = this device's
}

// PolicyConfig is where the owner's policy lies.
type PolicyConfig struct {
	File string
}

// MetricsConfig is where metrics go besides the control socket.
type MetricsConfig struct {
	Listen   string // loopback address and port, "" = off
	Textfile string // a file for a textfile collector, "" = none
}

// ReportConfig is where the device reports how it stands.
type ReportConfig struct {
	URL        string        // https://…, http:// on loopback only; "" = nowhere
	Every      time.Duration // at the latest; a change is reported at once
	Proxy      string        // as in RepositoryConfig, and so the next two
	CAFile     string
	ClientCert string
}

// configFile is Config as the file writes it.
type configFile struct {
	Format   string `toml:"format"`
	StateDir string `toml:"state_dir"`
	Control  struct {
		Socket string `toml:"socket"`
		Group  string `toml:"group"`
	} `toml:"control"`
	Repository struct {
		URL        string   `toml:"url"`
		Root       string   `toml:"root"`
		CheckEvery string   `toml:"check_every"`
		Proxy      string   `toml:"proxy"`
		CAFile     string   `toml:"ca_file"`
		ClientCert string   `toml:"client_cert"`
		Products   []string `toml:"products"`
		Images     []string `toml:"images"`
	} `toml:"repository"`
	Backend struct {
		Name      string `toml:"name"`
		Scene     string `toml:"scene"`
		ScanEvery string `toml:"scan_every"`
	} `toml:"backend"`
	Eligibility struct {
		Profile string `toml:"profile"`
		Facts   string `toml:"facts"`
	} `toml:"eligibility"`
	Policy struct {
		File string `toml:"file"`
	} `toml:"policy"`
	Metrics struct {
		Listen   string `toml:"listen"`
		Textfile string `toml:"textfile"`
	} `toml:"metrics"`
	Report struct {
		URL        string `toml:"url"`
		Every      string `toml:"every"`
		Proxy      string `toml:"proxy"`
		CAFile     string `toml:"ca_file"`
		ClientCert string `toml:"client_cert"`
	} `toml:"report"`
}

// DefaultConfig is what an empty file means on this system.
func DefaultConfig() *Config { return defaultConfig(runtime.GOOS, os.Getenv("ProgramData")) }

// DefaultConfigPath is where the service looks for its configuration.
func DefaultConfigPath() string {
	return filepath.Join(filepath.Dir(DefaultConfig().Policy.File), "config.toml")
}

func defaultConfig(goos, programData string) *Config {
	c := &Config{
		StateDir:    "/var/lib/hotpatchd",
		Control:     ControlConfig{Socket: "/run/hotpatchd/control.sock", Group: "hotpatch"},
		Repository:  RepositoryConfig{Root: "/etc/hotpatchd/root.json", CheckEvery: 5 * time.Minute, Products: []Glob{"*"}, Images: []Glob{"*"}},
		Backend:     BackendConfig{Name: "auto", ScanEvery: 2 * time.Second},
		Eligibility: EligibilityConfig{Profile: "auto"},
		Policy:      PolicyConfig{File: "/etc/hotpatchd/policy.toml"},
		Report:      ReportConfig{Every: time.Hour},
	}
	if goos == "windows" {
		if programData == "" {
			programData = `C:\ProgramData`
		}
		home := programData + `\hotpatchd\`
		c.StateDir, c.Control.Socket = home+"state", `\\.\pipe\hotpatchd`
		c.Repository.Root, c.Policy.File = home+"root.json", home+"policy.toml"
	}
	return c
}

// LoadConfig reads a configuration file. Every error names the file, and where
// it can the line and column, and shows the line.
func LoadConfig(path string) (*Config, error) {
	c, _, err := LoadManagedConfig(path, nil)
	return c, err
}

// LoadManagedConfig is LoadConfig with what device management has set over it
// (m may be nil), and with every key as it is in force.
func LoadManagedConfig(path string, m Management) (*Config, []control.Setting, error) {
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	text, err := readDocument(absolute)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot read the configuration: %w", err)
	}
	all, err := managedBy(m)
	if err != nil {
		return nil, nil, err
	}
	c := DefaultConfig()
	shown, err := c.read(absolute, text, runtime.GOOS, all.of(&configFile{}))
	if err != nil {
		return nil, nil, err
	}
	return c, shown, nil
}

// parse puts what text says over the defaults in c.
func (c *Config) parse(file string, text []byte, goos string) error {
	_, err := c.read(file, text, goos, settings{})
	return err
}

// read is parse with device management's word over the text.
func (c *Config) read(file string, text []byte, goos string, over settings) ([]control.Setting, error) {
	in := configFile{StateDir: c.StateDir}
	in.Control.Socket, in.Control.Group = c.Control.Socket, c.Control.Group
	in.Repository.Root = c.Repository.Root
	in.Backend.Name, in.Eligibility.Profile = c.Backend.Name, c.Eligibility.Profile
	in.Policy.File = c.Policy.File
	d, err := decode(file, text, ConfigFormat, &in)
	if err == nil {
		err = d.overlay(&in, over)
	}
	if err != nil {
		return nil, err
	}
	c.File = file
	c.StateDir = in.StateDir
	c.Control = ControlConfig{Socket: in.Control.Socket, Group: in.Control.Group}
	c.Repository.URL, c.Repository.Root, c.Repository.Proxy = in.Repository.URL, in.Repository.Root, in.Repository.Proxy
	c.Repository.CAFile, c.Repository.ClientCert = in.Repository.CAFile, in.Repository.ClientCert
	c.Backend.Name, c.Backend.Scene = in.Backend.Name, in.Backend.Scene
	c.Eligibility = EligibilityConfig{Profile: in.Eligibility.Profile, Facts: in.Eligibility.Facts}
	c.Policy.File = in.Policy.File
	c.Metrics = MetricsConfig{Listen: in.Metrics.Listen, Textfile: in.Metrics.Textfile}
	c.Report.URL, c.Report.Proxy, c.Report.CAFile, c.Report.ClientCert = in.Report.URL, in.Report.Proxy, in.Report.CAFile, in.Report.ClientCert

	c.resolve(filepath.Dir(file), goos)
	if c.Repository.CheckEvery, err = d.duration("repository.check_every", in.Repository.CheckEvery, c.Repository.CheckEvery, minCheckEvery, maxCheckEvery); err != nil {
		return nil, err
	}
	if c.Backend.ScanEvery, err = d.duration("backend.scan_every", in.Backend.ScanEvery, c.Backend.ScanEvery, minScanEvery, maxScanEvery); err != nil {
		return nil, err
	}
	if c.Report.Every, err = d.duration("report.every", in.Report.Every, c.Report.Every, minReportEvery, maxReportEvery); err != nil {
		return nil, err
	}
	if c.Repository.Products, err = d.globs("repository.products", in.Repository.Products, c.Repository.Products); err != nil {
		return nil, err
	}
	if c.Repository.Images, err = d.globs("repository.images", in.Repository.Images, c.Repository.Images); err != nil {
		return nil, err
	}
	if err := c.check(d, goos); err != nil {
		return nil, err
	}
	return d.effective(&in, map[string]string{
		"repository.check_every": strconv.Quote(c.Repository.CheckEvery.String()), "backend.scan_every": strconv.Quote(c.Backend.ScanEvery.String()),
		"report.every":        strconv.Quote(c.Report.Every.String()),
		"repository.products": `["*"]`, "repository.images": `["*"]`,
	}), nil
}

// resolve makes relative paths count from the folder of the configuration.
func (c *Config) resolve(folder, goos string) {
	for _, p := range []*string{
		&c.StateDir, &c.Control.Socket, &c.Repository.Root, &c.Repository.CAFile, &c.Repository.ClientCert,
		&c.Backend.Scene, &c.Eligibility.Facts, &c.Policy.File, &c.Metrics.Textfile,
		&c.Report.CAFile, &c.Report.ClientCert,
	} {
		pipe := goos == "windows" && p == &c.Control.Socket
		if *p != "" && !pipe && !filepath.IsAbs(*p) && !(goos == "windows" && len(*p) > 2 && (*p)[1] == ':') {
			*p = filepath.Join(folder, *p)
		}
	}
}

// check looks at each value and at what must fit together.
func (c *Config) check(d *document, goos string) error {
	for _, v := range []keyValue{{"state_dir", c.StateDir}, {"control.socket", c.Control.Socket}, {"policy.file", c.Policy.File}} {
		if v.value == "" {
			return d.errorf(v.key, "must not be empty")
		}
	}
	switch {
	case goos == "windows" && !strings.HasPrefix(strings.ToLower(c.Control.Socket), `\\.\pipe\`):
		return d.errorf("control.socket", `%s is not a pipe, which is \\.\pipe\NAME`, c.Control.Socket)
	case goos != "windows" && len(c.Control.Socket) > maxSocket:
		return d.errorf("control.socket", "%s is longer than %d bytes, the most that a Unix socket's address holds", c.Control.Socket, maxSocket)
	}
	if err := d.oneOf("backend.name", c.Backend.Name, "auto", "ptrace", "win32", "sim"); err != nil {
		return err
	}
	switch sim := c.Backend.Name == "sim"; {
	case c.Backend.Name == "ptrace" && goos != "linux":
		return d.errorf("backend.name", `"ptrace" is for Linux, this is %s`, goos)
	case c.Backend.Name == "win32" && goos != "windows":
		return d.errorf("backend.name", `"win32" is for Windows, this is %s`, goos)
	case sim && c.Backend.Scene == "":
		return d.errorf("backend.name", `"sim" needs [backend] scene, the file that describes the simulated machine`)
	case !sim && c.Backend.Scene != "":
		return d.errorf("backend.scene", `goes with [backend] name = "sim" only, not with %q`, c.Backend.Name)
	case !sim && c.Eligibility.Facts != "":
		return d.errorf("eligibility.facts", `goes with [backend] name = "sim" only: a real device is judged by its own facts`)
	}
	if err := d.oneOf("eligibility.profile", c.Eligibility.Profile, "auto", string(eligibility.WindowsClient),
		string(eligibility.WindowsServer), string(eligibility.LinuxDevice)); err != nil {
		return err
	}
	if err := c.checkRepository(d); err != nil {
		return err
	}
	if err := c.checkReport(d); err != nil {
		return err
	}
	return c.checkMetrics(d)
}

// keyValue is a key of the configuration and what it is set to.
type keyValue struct{ key, value string }

// unused refuses settings that would be passed over in silence.
func (d *document) unused(settings []keyValue, why string) error {
	for _, s := range settings {
		if s.value != "" {
			return d.errorf(s.key, "%s", why)
		}
	}
	return nil
}

func (c *Config) checkRepository(d *document) error {
	r := c.Repository
	network := []keyValue{{"repository.proxy", r.Proxy}, {"repository.ca_file", r.CAFile}, {"repository.client_cert", r.ClientCert}}
	if r.URL == "" {
		return d.unused(network, "has no use without [repository] url")
	}
	if r.Root == "" {
		return d.errorf("repository.root", "must not be empty when [repository] url is set: it is what the releases' signatures are checked against")
	}
	u, err := url.Parse(r.URL)
	switch {
	case err != nil:
		return d.errorf("repository.url", "%q is not a URL", r.URL)
	case u.RawQuery != "" || u.Fragment != "":
		return d.errorf("repository.url", "must not have a query or a fragment")
	case u.Scheme == "https" && u.Hostname() != "":
	case u.Scheme == "http" && loopback(u.Hostname()):
	case u.Scheme == "http":
		return d.errorf("repository.url", "http is for this machine's own addresses only, use https")
	case u.Scheme == "file" && (u.Host != "" || !strings.HasPrefix(u.Path, "/")):
		return d.errorf("repository.url", "a folder is written file:///PATH, with three slashes")
	case u.Scheme == "file":
	default:
		return d.errorf("repository.url", "%q is neither https://… nor file:///…", r.URL)
	}
	if u.Scheme == "file" {
		return d.unused(network, "has no use with a file:/// repository")
	}
	return d.proxy("[repository]", r.Proxy)
}

// proxy checks the address of a proxy. It may hold a password: it is not repeated.
func (d *document) proxy(table, proxy string) error {
	if proxy == "" {
		return nil
	}
	p, err := url.Parse(proxy)
	if err != nil || p.Hostname() == "" || p.Scheme != "http" && p.Scheme != "https" && p.Scheme != "socks5" {
		return d.show(0, 0, `%s proxy: must be a URL such as http://proxy.example.com:8080`, table)
	}
	return nil
}

func (c *Config) checkReport(d *document) error {
	r := c.Report
	if r.URL == "" {
		return d.unused([]keyValue{{"report.proxy", r.Proxy}, {"report.ca_file", r.CAFile}, {"report.client_cert", r.ClientCert}}, "has no use without [report] url")
	}
	u, err := url.Parse(r.URL)
	switch {
	case err != nil || u.Hostname() == "":
		return d.show(0, 0, "[report] url: must be an address such as https://fleet.example.com/reports")
	case u.User != nil: // it holds a password: it is not repeated
		return d.show(0, 0, "[report] url: must not have a user; a device shows who it is by client_cert")
	case u.RawQuery != "" || u.Fragment != "":
		return d.errorf("report.url", "must not have a query or a fragment")
	case u.Scheme == "http" && !loopback(u.Hostname()):
		return d.errorf("report.url", "http is for this machine's own addresses only, use https")
	case u.Scheme != "https" && u.Scheme != "http":
		return d.errorf("report.url", "%q is not https://…", r.URL)
	}
	return d.proxy("[report]", r.Proxy)
}

func (c *Config) checkMetrics(d *document) error {
	if c.Metrics.Listen == "" {
		return nil
	}
	host, port, err := net.SplitHostPort(c.Metrics.Listen)
	if err != nil || port == "" {
		return d.errorf("metrics.listen", "%q is not HOST:PORT", c.Metrics.Listen)
	}
	if !loopback(host) {
		return d.errorf("metrics.listen", "%s is not a loopback address; metrics are read by this machine only", c.Metrics.Listen)
	}
	return nil
}

func loopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && address.IsLoopback()
}

// BackendName is the backend meant on this system: "auto" resolved.
func (c *Config) BackendName() string {
	switch {
	case c.Backend.Name != "auto":
		return c.Backend.Name
	case runtime.GOOS == "windows":
		return "win32"
	}
	return "ptrace"
}
