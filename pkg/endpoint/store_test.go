// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

func record(containerID, ifName string) *Record {
	return &Record{
		ContainerID: containerID,
		IfName:      ifName,
		Netns:       "/run/netns/a",
		Network:     "margay",
		Namespace:   "default",
		Name:        "web-0",
		UID:         "1f0c",
		Labels:      map[string]string{"app": "web"},
		Addresses:   []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")},
		MAC:         "02:00:00:00:00:01",
		HostMAC:     "02:00:00:00:00:02",
		HostIfName:  "mgy0",
		HostIfindex: 7,
		Policy:      "published",
		Created:     time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	}
}

var equateAddrs = cmpopts.EquateComparable(netip.Addr{})

func TestSaveLoadDelete(t *testing.T) {
	s := NewStore(t.TempDir())
	want := record("c1", "eth0")
	if err := s.Save(want); err != nil {
		t.Fatal(err)
	}
	got, err := s.Load("c1", "eth0")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, equateAddrs); diff != "" {
		t.Errorf("Load() differs (-want +got):\n%s", diff)
	}
	for range 2 {
		if err := s.Delete("c1", "eth0"); err != nil {
			t.Errorf("Delete() = %v, want nil", err)
		}
	}
	if _, err := s.Load("c1", "eth0"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load() after Delete() = %v, want fs.ErrNotExist", err)
	}
}

func TestSaveReplacesAndLeavesNoTemporaryFile(t *testing.T) {
	s := NewStore(t.TempDir())
	for _, name := range []string{"old", "new"} {
		r := record("c1", "eth0")
		r.Name = name
		if err := s.Save(r); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Load("c1", "eth0")
	if err != nil || got.Name != "new" {
		t.Errorf("Load() = %+v, %v, want the record named new", got, err)
	}
	entries, _ := os.ReadDir(s.Dir())
	if len(entries) != 1 {
		t.Errorf("directory holds %v, want one file", entries)
	}
}

func TestDeleteRemovesWhatAKilledSaveLeft(t *testing.T) {
	s := NewStore(t.TempDir())
	if err := s.Save(record("c1", "eth0")); err != nil {
		t.Fatal(err)
	}
	path, _ := s.Path("c1", "eth0")
	if err := os.WriteFile(tempPath(path), []byte(`{"con`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete("c1", "eth0"); err != nil {
		t.Fatal(err)
	}
	if entries, _ := os.ReadDir(s.Dir()); len(entries) != 0 {
		t.Errorf("directory holds %v, want nothing", entries)
	}
}

func TestListSkipsAndReportsUnreadableRecords(t *testing.T) {
	s := NewStore(t.TempDir())
	if got, err := s.List(); len(got) != 0 || err != nil {
		t.Fatalf("List() without a directory = %v, %v, want nothing", got, err)
	}
	for _, id := range []string{"b", "a"} {
		if err := s.Save(record(id, "eth0")); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"half-eth0.json":    `{"version":1,"containerID":"ha`,
		"newer-eth0.json":   `{"version":99,"containerID":"newer","ifName":"eth0"}`,
		"renamed-eth0.json": `{"version":1,"containerID":"other","ifName":"eth0"}`,
		".a-eth0.json.tmp":  `{`,
		"README":            `not ours`,
	} {
		if err := os.WriteFile(filepath.Join(s.Dir(), name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.List()
	var ids []string
	for _, r := range got {
		ids = append(ids, r.ContainerID)
	}
	if diff := cmp.Diff([]string{"a", "b"}, ids); diff != "" {
		t.Errorf("List() ids differ (-want +got):\n%s", diff)
	}
	for _, want := range []string{"half-eth0.json", "newer-eth0.json", "renamed-eth0.json"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("List() error = %v, want it to name %s", err, want)
		}
	}
	if err != nil && (strings.Contains(err.Error(), ".tmp") || strings.Contains(err.Error(), "README")) {
		t.Errorf("List() error = %v, want no word of temporary and foreign files", err)
	}
}

func TestNamesThatCannotBeFileNames(t *testing.T) {
	s := NewStore(t.TempDir())
	for name, c := range map[string]struct{ id, ifName string }{
		"empty id":         {"", "eth0"},
		"parent directory": {"../../etc", "eth0"},
		"slash in id":      {"a/b", "eth0"},
		"hidden":           {".a", "eth0"},
		"long id":          {strings.Repeat("a", maxContainerID+1), "eth0"},
		"empty interface":  {"a", ""},
		"dots":             {"a", ".."},
		"slash":            {"a", "e/0"},
		"space":            {"a", "e 0"},
		"long interface":   {"a", "abcdefghijklmnop"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := s.Save(record(c.id, c.ifName)); !errors.Is(err, ErrName) {
				t.Errorf("Save() = %v, want ErrName", err)
			}
			if _, err := s.Load(c.id, c.ifName); !errors.Is(err, ErrName) {
				t.Errorf("Load() = %v, want ErrName", err)
			}
			if err := s.Delete(c.id, c.ifName); !errors.Is(err, ErrName) {
				t.Errorf("Delete() = %v, want ErrName", err)
			}
		})
	}
}

func TestReaderNeverSeesHalfARecord(t *testing.T) {
	s := NewStore(t.TempDir())
	if err := s.Save(record("c1", "eth0")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 500 {
			if err := s.Save(record("c1", "eth0")); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for range 500 {
		if got, err := s.List(); err != nil || len(got) != 1 {
			t.Fatalf("List() during Save() = %d records, %v, want 1", len(got), err)
		}
	}
	wg.Wait()
}
