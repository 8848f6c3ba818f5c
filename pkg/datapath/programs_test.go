// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"errors"
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/margay-cni/margay/pkg/bpf/object"
)

// Where the kernel tells nothing of its structures the programs load and do without; an error in reading them is one.
func TestKernelWithoutTypes(t *testing.T) {
	t.Parallel()
	types, err := kernelTypes(func() (*btf.Spec, error) { return nil, fmt.Errorf("find vmlinux: %w", ebpf.ErrNotSupported) })
	must(t, err)
	specs, err := object.ProgramSpecs()
	must(t, err)
	for _, spec := range specs {
		dropOptional(spec)
		coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: types}})
		if err != nil {
			t.Fatalf("load without the kernel's types: %+v", err)
		}
		coll.Close()
	}
	broken := errors.New("no memory")
	if _, err := kernelTypes(func() (*btf.Spec, error) { return nil, broken }); !errors.Is(err, broken) {
		t.Errorf("kernelTypes() = %v, want %v", err, broken)
	}
}
