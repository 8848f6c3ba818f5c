// SPDX-License-Identifier: Apache-2.0

// Package object holds the compiled objects of bpf/, and names enum values from their BTF. It is the only importer of the embedded
// objects. What only works on what is loaded already does without it: see pkg/bpf.
package object

import "github.com/cilium/ebpf"

// MapSpecs returns the definition of every map in bpf/maps.h, by name.
func MapSpecs() (map[string]*ebpf.MapSpec, error) {
	spec, err := loadDp()
	if err != nil {
		return nil, err
	}
	maps := map[string]*ebpf.MapSpec{}
	for name, m := range spec.Maps {
		if m.Type != ebpf.UnspecifiedMap && name[0] != '.' {
			maps[name] = m
		}
	}
	return maps, nil
}

// ProgramSpecs returns the embedded objects that hold programs. Each call parses them anew: the caller owns what it gets.
func ProgramSpecs() ([]*ebpf.CollectionSpec, error) {
	var specs []*ebpf.CollectionSpec
	for _, load := range []func() (*ebpf.CollectionSpec, error){loadPod, loadNetdev, loadOverlay, loadHost, loadSweep} {
		spec, err := load()
		if err != nil {
			return nil, err
		}
		specs = append(specs, spec)
	}
	return specs, nil
}
