// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

var (
	programNames = []string{
		bpf.ProgFromPod, bpf.ProgToPod, bpf.ProgFromNetdev, bpf.ProgFromL3Netdev, bpf.ProgToNetdev, bpf.ProgFromOverlay, bpf.ProgToOverlay,
		bpf.ProgFromHost, bpf.ProgToLoopback, bpf.ProgSweepFlows, bpf.ProgSweepFlow,
	}
	// optionalPrograms are missing where the kernel has no BTF.
	optionalPrograms = map[string]bool{bpf.ProgSweepFlow: true}
)

// ensurePrograms verifies, loads and pins this build's programs over the given maps. They appear under their directory's final name all
// at once; what a crash left under the temporary name is removed first.
func ensurePrograms(cfg Config, shared map[string]*ebpf.Map) error {
	final, partial := cfg.ProgramDir(), cfg.ProgramDir()+"-partial" // bpffs has no dots in names
	for _, dir := range []string{partial, final} {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove left-over programs: %w", err)
		}
	}
	if err := os.MkdirAll(partial, 0o700); err != nil {
		return fmt.Errorf("make the program directory: %w", err)
	}
	specs, err := object.ProgramSpecs()
	if err != nil {
		return fmt.Errorf("read the programs: %w", err)
	}
	kernel := btf.NewCache()
	for _, spec := range specs {
		if err := pinPrograms(spec, shared, kernel, partial); err != nil {
			return err
		}
	}
	if err := os.Rename(partial, final); err != nil {
		return fmt.Errorf("publish the programs: %w", err)
	}
	return nil
}

// LoadPrograms loads one object's programs over maps that exist already. The caller closes them.
func LoadPrograms(spec *ebpf.CollectionSpec, over map[string]*ebpf.Map) (*ebpf.Collection, error) {
	return loadPrograms(spec, over, btf.NewCache())
}

// loadPrograms reads of the kernel's types what is not in the cache yet.
func loadPrograms(spec *ebpf.CollectionSpec, over map[string]*ebpf.Map, kernel *btf.Cache) (*ebpf.Collection, error) {
	replacements := map[string]*ebpf.Map{}
	for name, m := range spec.Maps {
		if shared, ok := over[name]; ok {
			m.MaxEntries = shared.MaxEntries()
			replacements[name] = shared
		}
	}
	types, err := kernelTypes(kernel.Kernel)
	if err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		MapReplacements: replacements, Cache: kernel, Programs: ebpf.ProgramOptions{KernelTypes: types},
	})
	if err != nil {
		return nil, loadError(err)
	}
	return coll, nil
}

// kernelTypes returns what tells the programs where the kernel's own structures have the fields that they read: the kernel's BTF, but not that
// of its modules, which the library would read as well. Of a kernel without BTF it is empty, and the programs do without the fields.
func kernelTypes(kernel func() (*btf.Spec, error)) (*btf.Spec, error) {
	types, err := kernel()
	if errors.Is(err, ebpf.ErrNotSupported) {
		return new(btf.Builder).Spec()
	}
	if err != nil {
		return nil, fmt.Errorf("read the kernel's types: %w", err)
	}
	return types, nil
}

func pinPrograms(spec *ebpf.CollectionSpec, shared map[string]*ebpf.Map, kernel *btf.Cache, dir string) error {
	coll, err := loadPrograms(spec, shared, kernel)
	if errors.Is(err, ebpf.ErrNotSupported) && dropOptional(spec) {
		coll, err = loadPrograms(spec, shared, kernel)
	}
	if err != nil {
		return err
	}
	defer coll.Close()
	for name, prog := range coll.Programs {
		if err := prog.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// dropOptional takes the optional programs out of an object, and reports whether there were any.
func dropOptional(spec *ebpf.CollectionSpec) bool {
	before := len(spec.Programs)
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return optionalPrograms[name] })
	return len(spec.Programs) < before
}

// loadError says what a person can do about a kernel that refuses a program. The verifier's last lines are in the error.
func loadError(err error) error {
	if ve, ok := errors.AsType[*ebpf.VerifierError](err); ok {
		return fmt.Errorf("the kernel's verifier refuses the programs; Margay is tested on kernels 6.1, 6.12 and 6.18: %-10v", ve)
	}
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("load the programs (CAP_BPF and CAP_NET_ADMIN are needed): %w", err)
	}
	return fmt.Errorf("load the programs: %w", err)
}
