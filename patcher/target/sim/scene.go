package sim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"hotpatchd/patcher/target"
)

// SceneFormat is the format line every scene starts with.
const SceneFormat = "hotpatchd-scene/1"

// Bounds of a scene: a scene is written by hand, but it is still a file from outside.
const (
	maxSceneBytes = 1 << 20
	maxImageBytes = 256 << 20
	maxProcesses  = 16384
	maxPerProcess = 4096 // modules, threads, regions and guards, each
	maxStackWords = 8192
	maxRegion     = 1 << 46
)

// Scene describes a machine. Unknown keys are refused.
//
// An address or word is written as a number, as "0x…", or relative to a module:
// "app.dll!+0x1234".
type Scene struct {
	Format    string    `toml:"format"` // SceneFormat
	Seed      uint64    `toml:"seed"`   // of everything chosen pseudo-randomly
	Processes []Process `toml:"processes"`
	Faults    []Fault   `toml:"faults"`
}

// Process describes a process to be started.
type Process struct {
	PID     int         `toml:"pid"`   // 0: the next free one
	Exe     string      `toml:"exe"`   // path of the native executable; default /usr/bin/pe-host
	Image   string      `toml:"image"` // PE file of the main program, relative to the scene; "" for none
	User    string      `toml:"user"`  // default "root"
	UID     int         `toml:"uid"`
	Unit    string      `toml:"unit"`
	Arch    target.Arch `toml:"arch"` // default amd64
	PEB     any         `toml:"peb"`
	Denied  bool        `toml:"denied"` // the system refuses us this process
	Guards  []Guard     `toml:"guards"`
	Modules []Module    `toml:"modules"`
	Threads []Thread    `toml:"threads"` // default: one thread that waits outside every module
	Regions []Region    `toml:"regions"`
}

// Guard is a reason of the system not to touch the process.
type Guard struct {
	Code string `toml:"code"` // a target.GuardCode
	Text string `toml:"text"`
}

// Module is a PE image to be mapped.
type Module struct {
	File   string `toml:"file"`   // relative to the scene
	Name   string `toml:"name"`   // by which words refer to it; default: last element of File
	Path   string `toml:"path"`   // what the regions say; default: where File lies
	Base   any    `toml:"base"`   // 0: chosen pseudo-randomly, a multiple of 64 KiB
	Header string `toml:"header"` // "file" (default): only the header's page is backed by the file, as under Wine; "anonymous": nothing is; "image": all is, as on Windows
	Image  []byte `toml:"-"`      // the file's bytes, instead of File being read
}

// Thread is one thread of a process.
type Thread struct {
	ID          int            `toml:"id"` // default: the pid for the first, then counting up
	PC          any            `toml:"pc"` // default: in code that belongs to no module
	SP          any            `toml:"sp"` // default: in a stack made for it
	Stack       []any          `toml:"stack"`
	Regs        map[string]any `toml:"regs"`     // "rbp" = …; "x29" = …; rsp is SP
	State       string         `toml:"state"`    // default "running"
	AltStack    *Signal        `toml:"altstack"` // it handles a signal on its alternate stack
	Unstoppable bool           `toml:"unstoppable"`
}

// Signal is a signal being handled on the alternate stack: where the handler
// stands and what lies on that stack above the handler's frames and below the
// signal frame.
type Signal struct {
	PC    any   `toml:"pc"`
	Stack []any `toml:"stack"`
}

// Region is memory besides modules and stacks.
type Region struct {
	At     any    `toml:"at"`
	Size   uint64 `toml:"size"`   // bytes, a multiple of the page size
	Prot   string `toml:"prot"`   // "rw-", "r-x", …; default "rw-"; "---" is a gap that is taken
	Kind   string `toml:"kind"`   // "private" (default), "file", "heap", "stack", "special"
	Shared bool   `toml:"shared"` // a write would be seen by other processes
	Path   string `toml:"path"`
	Words  []any  `toml:"words"` // its first contents, 8 bytes each
}

// ParseScene reads a scene. Errors name line and column.
func ParseScene(b []byte) (*Scene, error) {
	if len(b) > maxSceneBytes {
		return nil, fmt.Errorf("cannot read scene: %d bytes, more than %d", len(b), maxSceneBytes)
	}
	var s Scene
	d := toml.NewDecoder(strings.NewReader(string(b))).DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			e := strict.Errors[0]
			line, col := e.Position()
			return nil, fmt.Errorf("cannot read scene: line %d, column %d: unknown key %q", line, col, strings.Join(e.Key(), "."))
		}
		var de *toml.DecodeError
		if errors.As(err, &de) {
			line, col := de.Position()
			return nil, fmt.Errorf("cannot read scene: line %d, column %d: %w", line, col, err)
		}
		return nil, fmt.Errorf("cannot read scene: %w", err)
	}
	if err := s.validate(); err != nil {
		return nil, fmt.Errorf("cannot read scene: %w", err)
	}
	return &s, nil
}

// Load makes a machine from a scene file. Files the scene names are read from
// the folder it lies in.
func Load(path string) (*Machine, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot load scene: %w", err)
	}
	defer f.Close()
	b, err := readAtMost(f, maxSceneBytes)
	if err != nil {
		return nil, fmt.Errorf("cannot load scene %s: %w", path, err)
	}
	s, err := ParseScene(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	abs, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("cannot load scene %s: %w", path, err)
	}
	return newMachine(s, folder(abs))
}

func (s *Scene) validate() error {
	if s.Format != SceneFormat {
		return fmt.Errorf("format is %q, want %q", s.Format, SceneFormat)
	}
	if len(s.Processes) > maxProcesses {
		return fmt.Errorf("%d processes, more than %d", len(s.Processes), maxProcesses)
	}
	for i := range s.Processes {
		if err := s.Processes[i].validate(); err != nil {
			return fmt.Errorf("process %d of the scene: %w", i+1, err)
		}
	}
	for i, f := range s.Faults {
		if err := f.validate(); err != nil {
			return fmt.Errorf("fault %d of the scene: %w", i+1, err)
		}
	}
	return nil
}

func (p *Process) validate() error {
	for what, n := range map[string]int{"modules": len(p.Modules), "threads": len(p.Threads), "regions": len(p.Regions), "guards": len(p.Guards)} {
		if n > maxPerProcess {
			return fmt.Errorf("%d %s, more than %d", n, what, maxPerProcess)
		}
	}
	switch p.Arch {
	case "", target.AMD64, target.ARM64, target.X86:
	default:
		return fmt.Errorf("unknown arch %q", p.Arch)
	}
	if p.PID < 0 || p.PID > 1<<30 {
		return fmt.Errorf("pid %d is out of range", p.PID)
	}
	for _, g := range p.Guards {
		if !knownGuard(target.GuardCode(g.Code)) {
			return fmt.Errorf("unknown guard %q", g.Code)
		}
	}
	for _, t := range p.Threads {
		if len(t.Stack) > maxStackWords || t.AltStack != nil && len(t.AltStack.Stack) > maxStackWords {
			return fmt.Errorf("thread %d: more than %d words on its stack", t.ID, maxStackWords)
		}
	}
	return nil
}

func knownGuard(c target.GuardCode) bool {
	switch c {
	case target.GuardTracer, target.GuardSeccomp, target.GuardMDWE, target.GuardDispatch,
		target.GuardProtected, target.Guard32Bit, target.GuardEmulated, target.GuardSelf,
		target.GuardSystem, target.GuardShared, target.GuardKernel:
		return true
	}
	return false
}
