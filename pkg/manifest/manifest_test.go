// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/state"
)

// deadline bounds every wait; a passing test comes nowhere near it.
const deadline = 20 * time.Second

// watched is a source that runs on a directory.
type watched struct {
	t         *testing.T
	dir       string
	source    *Source
	snapshots chan *state.Snapshot
}

func watchDir(t *testing.T, dir string, tweak ...func(*timing)) *watched {
	t.Helper()
	w := &watched{t: t, dir: dir, source: New(dir, "node-a", slog.New(slog.DiscardHandler)), snapshots: make(chan *state.Snapshot, 1000)}
	for _, fn := range tweak {
		fn(&w.source.timing)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.source.Run(ctx, func(s *state.Snapshot) { w.snapshots <- s }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run() = %v, want nil", err)
		}
	})
	return w
}

func (w *watched) write(name, text string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *watched) do(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// next returns the next snapshot.
func (w *watched) next() *state.Snapshot {
	w.t.Helper()
	select {
	case s := <-w.snapshots:
		return s
	case <-time.After(deadline):
		w.t.Fatalf("no snapshot within %v; problems: %v", deadline, w.source.Problems())
		return nil
	}
}

// becomes waits until a snapshot has exactly these services, and fails if one on the way has others than want or before.
func (w *watched) becomes(before, want string) {
	w.t.Helper()
	for {
		switch got := servicesOf(w.next()); got {
		case want:
			return
		case before:
		default:
			w.t.Fatalf("services = %q on the way from %q to %q", got, before, want)
		}
	}
}

// problem waits until a problem contains the text; none waits for an end of all problems. Snapshots do not tell: bad files make none.
func (w *watched) problem(text string) {
	w.t.Helper()
	end := time.Now().Add(deadline)
	for time.Now().Before(end) {
		all := strings.Join(words(w.source.Problems()), "\n")
		if text == "" && all == "" || text != "" && strings.Contains(all, text) {
			return
		}
		<-time.After(5 * time.Millisecond)
	}
	w.t.Fatalf("problems = %v, want %q", w.source.Problems(), text)
}

// quiet fails if something was published since.
func (w *watched) quiet() {
	w.t.Helper()
	select {
	case s := <-w.snapshots:
		w.t.Fatalf("services became %q, want no change", servicesOf(s))
	default:
	}
}

// servicesOf lists services and their first ports: "a:80 b:81".
func servicesOf(s *state.Snapshot) string {
	var out []string
	for key, svc := range s.Services {
		out = append(out, fmt.Sprintf("%s:%d", key.Name, svc.Ports[0].Port))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func service(name string, port int) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata:\n  name: %s\nspec:\n  clusterIPs: [10.96.0.%d, \"fd00::%d\"]\n  ports:\n  - port: %d\n", name, name[0], name[0], port)
}

func TestI10_FirstSnapshotHoldsAllFiles(t *testing.T) {
	t.Run("several", func(t *testing.T) {
		w := &watched{t: t, dir: t.TempDir()}
		w.write("a.yaml", service("a", 80))
		w.write("b.yml", service("b", 81))
		w.write("c.json", `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}, "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 82}]}}`)
		for _, name := range []string{"README.md", ".hidden.yaml", "a.yaml~", "a.yaml.bak", "#a.yaml#", ".a.yaml.swp", "4913"} {
			w.write(name, "no: {manifest")
		}
		w.do(os.Mkdir(filepath.Join(w.dir, "dir.yaml"), 0o755))
		w = watchDir(t, w.dir)
		if got, want := servicesOf(w.next()), "a:80 b:81 c:82"; got != want {
			t.Errorf("services = %q, want %q", got, want)
		}
		w.problem("")
	})
	t.Run("empty directory", func(t *testing.T) {
		if got := servicesOf(watchDir(t, t.TempDir()).next()); got != "" {
			t.Errorf("services = %q, want none", got)
		}
	})
	t.Run("one broken", func(t *testing.T) {
		dir := t.TempDir()
		w := &watched{t: t, dir: dir}
		w.write("a.yaml", service("a", 80))
		w.write("b.yaml", service("b", 70000))
		w = watchDir(t, dir)
		if got, want := servicesOf(w.next()), "a:80"; got != want {
			t.Errorf("services = %q, want %q", got, want)
		}
		if got := w.source.Incomplete(); !slices.Equal(got, []string{"b.yaml"}) {
			t.Errorf("Incomplete() = %v, want b.yaml", got)
		}
		w.write("b.yaml", service("b", 81))
		w.becomes("a:80", "a:80 b:81")
		if got := w.source.Incomplete(); len(got) != 0 {
			t.Errorf("Incomplete() = %v, want none", got)
		}
	})
}

func TestChangesOfFiles(t *testing.T) {
	w := watchDir(t, t.TempDir(), func(t *timing) { t.grace = 500 * time.Millisecond })
	w.becomes("", "")
	path := func(name string) string { return filepath.Join(w.dir, name) }

	w.write("a.yaml", service("a", 80))
	w.becomes("", "a:80")
	w.write("b.yaml", service("b", 80))
	w.becomes("a:80", "a:80 b:80")

	// Written elsewhere and renamed over.
	w.write(".a.yaml.tmp", service("a", 81))
	w.do(os.Rename(path(".a.yaml.tmp"), path("a.yaml")))
	w.becomes("a:80 b:80", "a:81 b:80")

	// As vim does: the old one becomes the backup, the name is free for a moment.
	w.do(os.Rename(path("a.yaml"), path("a.yaml~")))
	w.write("a.yaml", service("a", 82))
	w.do(os.Remove(path("a.yaml~")))
	w.becomes("a:81 b:80", "a:82 b:80")

	w.do(os.Rename(path("b.yaml"), path("c.yaml")))
	w.write("a.yaml", service("a", 83))
	w.becomes("a:82 b:80", "a:83 b:80")

	w.do(os.Remove(path("a.yaml")))
	w.becomes("a:83 b:80", "b:80")
	w.do(os.Remove(path("c.yaml")))
	w.becomes("b:80", "")
	w.problem("")
}

// TestVanishedFileMayComeBack takes longer to write a file anew than changes take to settle.
func TestVanishedFileMayComeBack(t *testing.T) {
	w := watchDir(t, t.TempDir(), func(t *timing) { t.grace = time.Hour })
	w.write("a.yaml", service("a", 80))
	w.becomes("", "a:80")
	w.do(os.Remove(filepath.Join(w.dir, "a.yaml")))
	w.write("b.yaml", service("b", 80)) // Its snapshot proves that the source looked meanwhile.
	w.becomes("a:80", "a:80 b:80")
	w.write("a.yaml", service("a", 81))
	w.becomes("a:80 b:80", "a:81 b:80")
}

func TestBrokenFilesDisturbNothing(t *testing.T) {
	w := watchDir(t, t.TempDir())
	good := service("a", 80) + "---\n" + service("b", 80)
	w.write("ab.yaml", good)
	w.write("c.yaml", service("c", 80))
	before := "a:80 b:80 c:80"
	for servicesOf(w.next()) != before {
	}
	for _, tc := range []struct{ name, text, problem string }{
		{"half written", good[:len(good)-4], "ab.yaml:17: "},
		{"half a word", good[:strings.LastIndex(good, "clusterIPs")+4], "ab.yaml:14: Service default/b: spec: string where a mapping is wanted"},
		{"one bad object", service("a", 81) + "---\n" + service("b", 0), "ab.yaml:17: Service default/b: spec.ports[0].port: is missing or 0"},
		{"no YAML", "\x00\x01", "ab.yaml: control characters are not allowed"},
		{"truncated", "", "ab.yaml: warning: is empty: what it held stays in force"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w.t = t
			w.write("ab.yaml", tc.text)
			w.problem(tc.problem)
			w.quiet()
			w.write("ab.yaml", good)
			w.becomes(before, before)
			w.problem("")
		})
	}
	w.t = t
	w.write("ab.yaml", "oops: [")
	w.problem("ab.yaml:1: ")
	w.write("c.yaml", service("c", 81))
	w.becomes(before, "a:80 b:80 c:81")
	w.do(os.Remove(filepath.Join(w.dir, "ab.yaml")))
	w.becomes("a:80 b:80 c:81", "c:81")
	w.problem("")
}

// TestOpenFileIsWaitedFor writes in place, with pauses longer than the settle time, text whose beginning is good YAML.
func TestOpenFileIsWaitedFor(t *testing.T) {
	w := watchDir(t, t.TempDir(), func(t *timing) { t.patience = time.Hour })
	w.write("a.yaml", service("a", 80))
	w.becomes("", "a:80")

	f, err := os.OpenFile(filepath.Join(w.dir, "a.yaml"), os.O_WRONLY|os.O_TRUNC, 0)
	w.do(err)
	if _, err := unix.FcntlInt(f.Fd(), unix.F_GETLEASE, 0); err != nil {
		t.Skipf("the filesystem has no leases: %v", err)
	}
	text := service("a", 8080)
	_, err = f.WriteString(text[:len(text)-3]) // port: 80
	w.do(err)
	// A change elsewhere proves that the source looked meanwhile.
	w.write("b.yaml", service("b", 80))
	w.becomes("a:80", "a:80 b:80")
	_, err = f.WriteString(text[len(text)-3:])
	w.do(err)
	w.write("b.yaml", service("b", 81))
	w.becomes("a:80 b:80", "a:80 b:81")
	w.do(f.Close())
	w.becomes("a:80 b:81", "a:8080 b:81")
}

func TestPatienceWithOpenFileEnds(t *testing.T) {
	w := watchDir(t, t.TempDir(), func(t *timing) { t.patience = 300 * time.Millisecond })
	f, err := os.Create(filepath.Join(w.dir, "a.yaml"))
	w.do(err)
	defer f.Close()
	_, err = f.WriteString(service("a", 80))
	w.do(err)
	w.becomes("", "a:80")
}

// TestConfigMapMount exchanges all files at once, as kubelet does with a mounted ConfigMap.
func TestConfigMapMount(t *testing.T) {
	dir := t.TempDir()
	w := &watched{t: t, dir: dir}
	version := func(n int, files map[string]string) {
		data := filepath.Join(dir, fmt.Sprintf("..2026_%d", n))
		w.do(os.Mkdir(data, 0o755))
		for name, text := range files {
			w.do(os.WriteFile(filepath.Join(data, name), []byte(text), 0o644))
		}
		w.do(os.Symlink(filepath.Base(data), filepath.Join(dir, "..data_tmp")))
		w.do(os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
		if n > 1 {
			w.do(os.RemoveAll(filepath.Join(dir, fmt.Sprintf("..2026_%d", n-1))))
		}
	}
	version(1, map[string]string{"a.yaml": service("a", 80), "b.yaml": service("b", 80)})
	for _, name := range []string{"a.yaml", "b.yaml"} {
		w.do(os.Symlink(filepath.Join("..data", name), filepath.Join(dir, name)))
	}
	w = watchDir(t, dir, func(t *timing) { t.resync = time.Hour })
	w.becomes("", "a:80 b:80")
	version(2, map[string]string{"a.yaml": service("a", 81), "b.yaml": service("b", 81)})
	w.becomes("a:80 b:80", "a:81 b:81")

	// A link to nothing keeps what was there, and is named.
	version(3, map[string]string{"b.yaml": service("b", 82)})
	w.becomes("a:81 b:81", "a:81 b:82")
	w.problem("a.yaml: open ")
	w.do(os.Remove(filepath.Join(dir, "a.yaml")))
	w.becomes("a:81 b:82", "b:82")
	w.problem("")
}

func TestDirectoryComesAndGoes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "manifests")
	w := watchDir(t, dir, func(t *timing) { t.retry = 20 * time.Millisecond })
	w.problem("no such file or directory")
	w.quiet()

	prepared := func(port int) string {
		other := fmt.Sprintf("%s-%d", dir, port)
		w.do(os.Mkdir(other, 0o755))
		w.do(os.WriteFile(filepath.Join(other, "a.yaml"), []byte(service("a", port)), 0o644))
		return other
	}
	w.do(os.Rename(prepared(80), dir))
	w.becomes("", "a:80")
	w.do(os.Rename(dir, dir+"-old"))
	w.problem("no such file or directory")
	w.quiet()
	w.do(os.Rename(prepared(81), dir))
	w.becomes("a:80", "a:81")
	w.problem("")
	w.write("a.yaml", service("a", 82)) // The new directory is watched.
	w.becomes("a:81", "a:82")
}

func TestNamedPipeDoesNotHang(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "a.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := watchDir(t, dir)
	w.becomes("", "")
	w.problem("a.yaml: is no regular file")
}

// TestI12_ChangesAreCoalesced writes many files in one go: the source may not publish each, nor wait for ever while changes go on.
func TestI12_ChangesAreCoalesced(t *testing.T) {
	w := watchDir(t, t.TempDir())
	w.becomes("", "")
	for i := range 100 {
		w.write(fmt.Sprintf("%03d.yaml", i), strings.ReplaceAll(service("s", 80), "name: s", fmt.Sprintf("name: s-%03d", i)))
	}
	published := 1
	for len(w.next().Services) != 100 {
		published++
	}
	if published > 20 {
		t.Errorf("%d snapshots for 100 files in one go, want few", published)
	}
}

func TestSnapshotsAreNotWrittenTo(t *testing.T) {
	w := watchDir(t, t.TempDir())
	w.becomes("", "")
	w.write("a.yaml", service("a", 80))
	first := w.next()
	w.write("b.yaml", service("b", 80))
	second := w.next()
	if diff := cmp.Diff("a:80", servicesOf(first)); diff != "" {
		t.Errorf("first snapshot after the second (-want +got):\n%s", diff)
	}
	if servicesOf(second) != "a:80 b:80" || len(first.Namespaces) != 1 {
		t.Errorf("second snapshot = %q", servicesOf(second))
	}
}

// A quick look takes a file for unchanged by its stamp only when that had settled: one that changes twice within a tick of the clock, and keeps
// its length, is seen.
func TestQuickLook(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.yaml")
	write := func(name string, modified time.Time) {
		t.Helper()
		text := "{apiVersion: v1, kind: Namespace, metadata: {name: " + name + "}}"
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, modified, modified); err != nil {
			t.Fatal(err)
		}
	}
	s := New(dir, "n1", slog.New(slog.DiscardHandler))
	look := func(quick bool) string {
		t.Helper()
		s.scan(quick)
		snapshot, problems := s.assemble()
		if len(problems) > 0 || len(snapshot.Namespaces) != 1 {
			t.Fatalf("namespaces %v, problems %v", snapshot.Namespaces, problems)
		}
		for name := range snapshot.Namespaces {
			return name
		}
		return ""
	}
	now := time.Now()
	write("a1", now)
	if got := look(true); got != "a1" {
		t.Fatalf("namespace %s, want a1: it had not been read", got)
	}
	write("a2", now)
	if got := look(true); got != "a2" {
		t.Fatalf("namespace %s, want a2: the time had not settled", got)
	}
	old := now.Add(-time.Hour)
	write("a3", old)
	if got := look(true); got != "a3" {
		t.Fatalf("namespace %s, want a3: the time is another one", got)
	}
	write("a4", old)
	if got := look(true); got != "a3" {
		t.Fatalf("namespace %s, want a3: nothing tells of the change, and a quick look does not read", got)
	}
	if got := look(false); got != "a4" {
		t.Fatalf("namespace %s, want a4: a look at everything reads", got)
	}
}
