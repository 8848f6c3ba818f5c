// SPDX-License-Identifier: Apache-2.0

package conf_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/margay-cni/margay/conf"
)

// loaders knows every kind of file that we ship, by its path below conf/.
var loaders = []struct {
	pattern string
	load    func(t *testing.T, content []byte)
}{
	{conf.ConflistName, loadConflist},
}

// TestEveryFileLoads: what is shipped works as it is, and a new file needs a loader here.
func TestEveryFileLoads(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) == ".go" {
			return err
		}
		t.Run(path, func(t *testing.T) {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range loaders {
				if ok, _ := filepath.Match(l.pattern, path); ok {
					l.load(t, content)
					return
				}
			}
			t.Error("nothing here knows how to load this file")
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// loadConflist reads the file as a runtime does.
func loadConflist(t *testing.T, content []byte) {
	list, err := libcni.NetworkConfFromBytes(content)
	if err != nil {
		t.Fatal(err)
	}
	// libcni takes the highest of cniVersions that it knows; a libcni that does not know the list takes cniVersion.
	if got, want := list.CNIVersion, "1.1.0"; got != want {
		t.Errorf("CNI version = %s, want %s: with less a runtime sends neither STATUS nor GC", got, want)
	}
	for _, p := range list.Plugins {
		for _, capability := range []string{"ips", "mac", "io.kubernetes.cri.pod-annotations"} {
			if p.Network.Type == "margay" && !p.Network.Capabilities[capability] {
				t.Errorf("plugin %s does not declare capability %s: the runtime would not pass it", p.Network.Type, capability)
			}
		}
	}
}

// TestEmbedded: what margay-install installs is the file that is tested here.
func TestEmbedded(t *testing.T) {
	want, err := os.ReadFile(conf.ConflistName)
	if err != nil {
		t.Fatal(err)
	}
	if string(conf.Conflist) != string(want) {
		t.Error("the embedded conflist is not the file")
	}
}
