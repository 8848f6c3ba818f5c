// SPDX-License-Identifier: Apache-2.0

package clustertest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// binDir is where this process' binaries are built; Main makes and removes it.
var binDir string

// Main runs the tests of a package that uses the fixture, for its TestMain, and returns the exit status. It owns the directory of the
// binaries, which are built when the first test asks for them.
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "margay-bin-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, "make the directory of binaries:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	binDir = dir
	return m.Run()
}

// built builds each binary once in this process.
var built = map[string]func() error{
	"margay": sync.OnceValue(func() error {
		return errors.Join(build("margay", "plugin"), build("margay-loader", "plugin/loader"))
	}),
	"margay-agent": sync.OnceValue(func() error { return build("margay-agent", "agent") }),
	"margayctl":    sync.OnceValue(func() error { return build("margayctl", "ctl") }),
}

func build(name, pkg string) error {
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(binDir, name), "github.com/margay-cni/margay/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", cmd, err, out)
	}
	return nil
}

// binary returns the path of a built binary.
func (c *Cluster) binary(name string) string {
	c.t.Helper()
	if binDir == "" {
		c.t.Fatal("the package's TestMain must call clustertest.Main")
	}
	c.must(built[name]())
	return filepath.Join(binDir, name)
}
