package private

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"
)

// TestParse: the table's words of SDDL are what the table judges.
func TestParse(t *testing.T) {
	for _, c := range judged {
		if c.sddl == "" {
			continue
		}
		sd, err := windows.SecurityDescriptorFromString(c.sddl)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if d, err := parse(sd); err != nil || !reflect.DeepEqual(d, c.d) {
			t.Errorf("%s: %+v, %v, want %+v", c.name, d, err, c.d)
		}
	}
}

// rights sets the DACL of a path. Wine keeps of it what a Unix mode can.
func rights(t *testing.T, path, sddl string) {
	t.Helper()
	sd, err := windows.SecurityDescriptorFromString(sddl)
	if err != nil {
		t.Fatal(err)
	}
	dacl, _, err := sd.DACL()
	if err != nil {
		t.Fatal(err)
	}
	if err := windows.SetNamedSecurityInfo(path, windows.SE_FILE_OBJECT, windows.DACL_SECURITY_INFORMATION|windows.PROTECTED_DACL_SECURITY_INFORMATION, nil, nil, dacl, nil); err != nil {
		t.Fatal(err)
	}
}

func TestHands(t *testing.T) {
	user, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		t.Fatal(err)
	}
	const closed = "D:P(A;OICI;FA;;;SY)(A;OICI;FA;;;BA)"
	mine := closed + "(A;OICI;FA;;;" + user.User.Sid.String() + ")"
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, file} {
		rights(t, path, mine)
		if err := CheckHands(path); err != nil {
			t.Error(err)
		}
		rights(t, path, mine+"(A;;FA;;;WD)")
		if err := CheckHands(path); !errors.Is(err, ErrStranger) || !strings.Contains(err.Error(), path+": Everyone may write to it") {
			t.Errorf("got %v", err)
		}
		if err := CheckHands(path, "S-1-1-0"); err != nil {
			t.Errorf("who is trusted is not: %v", err)
		}
		if err := CheckOwner(path); err != nil {
			t.Error(err)
		}
		if err := Protect(path, mine); err != nil {
			t.Error(err)
		}
		if err := CheckHands(path); err != nil {
			t.Errorf("after Protect: %v", err)
		}
	}
	for _, do := range []func(string) error{func(p string) error { return CheckHands(p) }, func(p string) error { return CheckOwner(p) }, func(p string) error { return Protect(p, mine) }} {
		if err := do(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("what is not there: %v", err)
		}
		if err := do("a\x00b"); err == nil {
			t.Error("a name with a zero byte is one")
		}
	}
	if err := Protect(dir, "nonsense"); err == nil {
		t.Error("nonsense protects")
	}
}

// TestStrangersThing: somebody else's is told as such, and not changed.
func TestStrangersThing(t *testing.T) {
	if err := verdict(`C:\x`, descriptor{owner: "S-1-5-21-9-9-9-1001"}, nil); !errors.Is(err, ErrStranger) || err.Error() != `C:\x: it belongs to S-1-5-21-9-9-9-1001` {
		t.Errorf("got %v", err)
	}
	if err := verdict(`C:\x`, descriptor{owner: "S-1-5-21-9-9-9-1001"}, []string{"S-1-5-21-9-9-9-1001"}); err != nil {
		t.Error(err)
	}
}

// makeLink makes a link to a folder: a symbolic link or a junction, or in Wine,
// which makes neither, a link of Unix by a program of Unix.
func makeLink(t *testing.T, to, link string) {
	t.Helper()
	if os.Symlink(to, link) == nil && there(link) || exec.Command("cmd", "/c", "mklink", "/J", link, to).Run() == nil && there(link) {
		return
	}
	unix := func(path string) string {
		name, err := windows.UTF16PtrFromString(path)
		if err != nil {
			t.Fatal(err)
		}
		find := windows.NewLazySystemDLL("kernel32.dll").NewProc("wine_get_unix_file_name")
		if find.Find() != nil {
			t.Skip("needs the right to make links")
		}
		p, _, _ := find.Call(uintptr(unsafe.Pointer(name)))
		return windows.BytePtrToString(*(**byte)(unsafe.Pointer(&p)))
	}
	// Of what is not there yet Wine knows the folder's name.
	at := unix(filepath.Dir(link)) + "/" + filepath.Base(link)
	// Not by os/exec, which wants a name that ends as those of Windows' programs do.
	ln, err := os.StartProcess(`Z:\bin\ln`, []string{"ln", "-s", unix(to), at}, &os.ProcAttr{Files: []*os.File{nil, nil, nil}})
	if err == nil {
		defer ln.Release()
	}
	t.Cleanup(func() { // RemoveAll takes it for a folder
		if rm, err := os.StartProcess(`Z:\bin\rm`, []string{"rm", at}, &os.ProcAttr{Files: []*os.File{nil, nil, nil}}); err == nil {
			rm.Release()
		}
		for end := time.Now().Add(10 * time.Second); there(link) && time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		}
	})
	// The program of Unix is not waited for.
	for end := time.Now().Add(10 * time.Second); !there(link); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no link: %v", err)
		}
	}
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestLinkIsNotFollowed: neither looked through nor protected through. Wine
// shows its link of a folder by the path's attributes only; that Windows shows
// it by the handle's is not proved here.
func TestLinkIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "theirs"), 0o700); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	makeLink(t, filepath.Join(dir, "theirs"), link)
	for what, err := range map[string]error{"CheckHands": CheckHands(link), "CheckOwner": CheckOwner(link), "Protect": Protect(link, "D:P(A;;FA;;;SY)")} {
		if !errors.Is(err, ErrLink) || !strings.Contains(err.Error(), link+" is a link") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := CheckHands(filepath.Join(dir, "theirs")); err != nil {
		t.Errorf("what it points to was changed: %v", err)
	}
}
