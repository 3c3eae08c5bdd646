package repository

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/theupdateframework/go-tuf/v2/metadata"

	"hotpatchd/agent/private"
)

// Roles are the four roles of a repository, each with keys of its own. The
// root keys name the others and belong offline; snapshot and timestamp sign
// often and may lie on the machine that runs refresh.
var Roles = []string{metadata.ROOT, metadata.TARGETS, metadata.SNAPSHOT, metadata.TIMESTAMP}

// Keys are private keys by role. A role may have several, or none where the
// work at hand does not need it.
type Keys map[string][]ed25519.PrivateKey

const (
	pemType    = "PRIVATE KEY" // PKCS #8, RFC 5958
	maxKeyFile = 64 << 10      // bytes
)

// GenerateKeys makes one ed25519 key for each role in dir: ROLE.pem, PKCS #8,
// readable by the owner only (package private). If any of them is there already nothing is written.
func GenerateKeys(dir string) ([]string, error) {
	if err := private.MakeFolder(dir); err != nil {
		return nil, fmt.Errorf("cannot make %s: %w", dir, err)
	}
	for _, role := range Roles {
		if _, err := os.Lstat(keyFile(dir, role)); !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s is there already: a lost key cannot be made again, so none is overwritten", keyFile(dir, role))
		}
	}
	var written []string
	for _, role := range Roles {
		if _, err := makeKey(keyFile(dir, role)); err != nil {
			return written, err
		}
		written = append(written, keyFile(dir, role))
	}
	return written, syncDir(dir)
}

// maxGenerations bounds the names tried for a key that replaces another.
const maxGenerations = 1000

// GenerateNext makes one more key for a role in dir, ROLE-N.pem with the first
// N from 2 on that is free, for Rotate. It returns the file's name, too.
func GenerateNext(dir, role string) (Keys, string, error) {
	for n := 2; n < maxGenerations; n++ {
		file := filepath.Join(dir, fmt.Sprintf("%s-%d.pem", role, n))
		if _, err := os.Lstat(file); !errors.Is(err, os.ErrNotExist) {
			continue
		}
		key, err := makeKey(file)
		if err != nil {
			return nil, "", err
		}
		return Keys{role: {key}}, file, syncDir(dir)
	}
	return nil, "", fmt.Errorf("%s holds %d keys for %s: too many", dir, maxGenerations, role)
}

// makeKey makes a key and keeps it in a new file.
func makeKey(file string) (ed25519.PrivateKey, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("cannot make a key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("cannot make a key: %w", err)
	}
	return key, writeNew(file, pem.EncodeToMemory(&pem.Block{Type: pemType, Bytes: der}))
}

func keyFile(dir, role string) string { return filepath.Join(dir, role+".pem") }

func writeNew(path string, b []byte) error {
	f, err := private.Create(path)
	if err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		os.Remove(path)
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}

// LoadKeys reads the keys of dir: ROLE.pem and, for roles with several keys,
// ROLE-ANYTHING.pem. Roles without a file have no key.
func LoadKeys(dir string) (Keys, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot read keys: %w", err)
	}
	keys := Keys{}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".pem")
		role, _, _ := strings.Cut(name, "-")
		if !ok || !slices.Contains(Roles, role) {
			continue
		}
		key, err := readKey(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		keys[role] = append(keys[role], key)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s holds no key: none of root.pem, targets.pem, snapshot.pem, timestamp.pem", dir)
	}
	return keys, nil
}

func readKey(path string) (ed25519.PrivateKey, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read key: %w", err)
	}
	if info.Size() > maxKeyFile {
		return nil, fmt.Errorf("%s has %d bytes: no key is that long", path, info.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read key: %w", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != pemType {
		return nil, fmt.Errorf("%s is not a private key in PEM (PKCS #8)", path)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s is not a private key: %w", path, err)
	}
	key, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s is not an ed25519 key", path)
	}
	return key, nil
}

// tufKey is the public half as metadata names it, and its id.
func tufKey(key ed25519.PrivateKey) (*metadata.Key, string, error) {
	k, err := metadata.KeyFromPublicKey(key.Public())
	if err != nil {
		return nil, "", err
	}
	id, err := k.ID()
	return k, id, err
}

// sign replaces the signatures of meta by those of every key that root names
// for the role, and refuses if they are too few.
func sign[T metadata.Roles](meta *metadata.Metadata[T], role string, root *metadata.Metadata[metadata.RootType], keys Keys) error {
	meta.ClearSignatures()
	for _, key := range keys[role] {
		_, id, err := tufKey(key)
		if err != nil {
			return err
		}
		if !slices.Contains(root.Signed.Roles[role].KeyIDs, id) {
			continue
		}
		signer, err := signature.LoadSigner(key, crypto.Hash(0))
		if err != nil {
			return err
		}
		if _, err := meta.Sign(signer); err != nil {
			return err
		}
	}
	if need := root.Signed.Roles[role].Threshold; len(meta.Signatures) < need {
		return fmt.Errorf("%s.json needs %d signatures, and of the keys that root.json names for it %d are at hand: give the folder with %s.pem (several keys: %s-NAME.pem)",
			role, need, len(meta.Signatures), role, role)
	}
	return nil
}
