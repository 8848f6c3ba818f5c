// SPDX-License-Identifier: Apache-2.0

package bpf

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

// Build names the embedded programs: equal objects, equal name. It is made of checksums, which are no signature.
func Build() string { return build }
