// SPDX-License-Identifier: Apache-2.0

// Package build makes the programs and images of the test cluster from Go modules, each pinned by a module below test/cluster/tools or by
// our own, and builds each again only when what it is made from has changed.
package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// KubernetesVersion is what the module that pins Kubernetes requires.
const KubernetesVersion = "v1.37.2"

const kubernetesModule = "test/cluster/tools/kubernetes"

// program is one binary of build/cluster/bin.
type program struct {
	name    string
	module  string // directory with the go.mod that pins it, from the repository's root
	pkg     string
	ldflags string
	test    bool     // a test binary
	sources []string // directories of the repository with its own code
}

func programs() []program {
	major, minor, _ := strings.Cut(strings.TrimPrefix(KubernetesVersion, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	const version = "k8s.io/component-base/version."
	kubernetes := fmt.Sprintf("-X %sgitVersion=%s -X %sgitMajor=%s -X %sgitMinor=%s", version, KubernetesVersion, version, major, version, minor)
	var all []program
	for _, name := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "kube-proxy"} {
		all = append(all, program{name: name, module: kubernetesModule, pkg: "k8s.io/kubernetes/cmd/" + name, ldflags: kubernetes})
	}
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		all = append(all, program{name: name, module: "test/cluster/tools/containerd", pkg: "github.com/containerd/containerd/v2/cmd/" + name,
			ldflags: "-X github.com/containerd/containerd/v2/version.Version=v2.4.2"})
	}
	all = append(all, imagePrograms()...)
	for _, name := range []string{"main/ptp", "ipam/host-local", "meta/portmap"} {
		all = append(all, program{name: filepath.Base(name), module: ".", pkg: "github.com/containernetworking/plugins/plugins/" + name})
	}
	return append(all,
		program{name: "etcd", module: "test/cluster/tools/etcd", pkg: ".", sources: []string{"test/cluster/tools/etcd"}},
		program{name: "cnitool", module: ".", pkg: "github.com/containernetworking/cni/cnitool"},
		program{name: "machine-init", module: ".", pkg: "./test/cluster/machine/init", sources: []string{"test/cluster/machine", "test/cluster/machine/init"}},
		program{name: "ginkgo", module: kubernetesModule, pkg: "github.com/onsi/ginkgo/v2/ginkgo"},
		program{name: "e2e.test", module: kubernetesModule, pkg: "k8s.io/kubernetes/test/e2e", ldflags: kubernetes, test: true},
	)
}

// imagePrograms are those that the images contain.
func imagePrograms() []program {
	const images = "k8s.io/kubernetes/test/images/"
	return []program{
		{name: "agnhost", module: kubernetesModule, pkg: images + "agnhost", ldflags: "-X main.Version=2.66.1"},
		{name: "regression-issue-74839", module: kubernetesModule, pkg: images + "regression-issue-74839"},
		{name: "coredns", module: "test/cluster/tools/coredns", pkg: ".", sources: []string{"test/cluster/tools/coredns"}},
	}
}

// Everything builds the programs into dir/bin and the images into dir/images. root is the repository's top directory. The upstream tests
// take minutes to build the first time: without tests they are left out.
func Everything(ctx context.Context, root, dir string, tests bool, log *slog.Logger) error {
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(filepath.Join(bin, ".keys"), 0o755); err != nil {
		return err
	}
	for _, p := range programs() {
		if p.test && !tests {
			continue
		}
		if err := p.build(ctx, root, bin, log); err != nil {
			return fmt.Errorf("build %s: %w", p.name, err)
		}
	}
	return images(ctx, root, dir, log)
}

// Program builds one of the programs into dir/bin, where Everything puts it, and returns its path. root and dir are absolute.
func Program(ctx context.Context, root, dir, name string, log *slog.Logger) (string, error) {
	all := programs()
	i := slices.IndexFunc(all, func(p program) bool { return p.name == name })
	if i < 0 {
		return "", fmt.Errorf("no program %s", name)
	}
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(filepath.Join(bin, ".keys"), 0o755); err != nil {
		return "", err
	}
	if err := all[i].build(ctx, root, bin, log); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return filepath.Join(bin, name), nil
}

// build builds a program unless the one that is there has the same key.
func (p program) build(ctx context.Context, root, bin string, log *slog.Logger) error {
	key, err := p.key(root)
	if err != nil {
		return err
	}
	target, keyFile := filepath.Join(bin, p.name), filepath.Join(bin, ".keys", p.name)
	if old, err := os.ReadFile(keyFile); err == nil && string(old) == key {
		if _, err := os.Stat(target); err == nil {
			return nil
		}
	}
	start := time.Now()
	args := []string{"build"}
	if p.test {
		args = []string{"test", "-c"}
	}
	args = append(args, "-trimpath", "-buildvcs=false", "-ldflags", "-s -w "+p.ldflags, "-o", target, p.pkg)
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(root, p.module)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%q: %w: %s", cmd.Args, err, out)
	}
	log.Info("built "+p.name, "seconds", time.Since(start).Round(100*time.Millisecond).Seconds())
	return os.WriteFile(keyFile, []byte(key), 0o644)
}

// key changes whenever the program would become another one: it covers the compiler, the flags, the versions of all modules, and our own
// sources.
func (p program) key(root string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH, p.pkg, p.ldflags, p.test)
	files := []string{filepath.Join(root, p.module, "go.mod"), filepath.Join(root, p.module, "go.sum")}
	for _, s := range p.sources {
		found, err := filepath.Glob(filepath.Join(root, s, "*.go"))
		if err != nil {
			return "", err
		}
		if len(found) == 0 {
			return "", fmt.Errorf("no sources in %s", s)
		}
		slices.Sort(found)
		files = append(files, found...)
	}
	for _, path := range files {
		if err := hashFile(h, path); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func hashFile(h io.Writer, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(h, filepath.Base(path), len(b), string(b))
	return err
}
