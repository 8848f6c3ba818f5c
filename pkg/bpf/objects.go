// SPDX-License-Identifier: Apache-2.0

package bpf

import "github.com/cilium/ebpf"

// Program names, as pinned and as in bpf/*.bpf.c.
const (
	ProgFromPod      = "from_pod"
	ProgToPod        = "to_pod"
	ProgFromNetdev   = "from_netdev"
	ProgFromL3Netdev = "from_l3_netdev"
	ProgToNetdev     = "to_netdev"
	ProgFromOverlay  = "from_overlay"
	ProgToOverlay    = "to_overlay"
	ProgFromHost     = "from_host"
	ProgToLoopback   = "to_loopback"
	ProgSweepFlow    = "sweep_flow"
	ProgSweepFlows   = "sweep_flows"
)

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

// Build names the embedded programs: equal objects, equal name. It is made of checksums, which are no signature.
func Build() string { return build }
