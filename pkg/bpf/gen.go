// SPDX-License-Identifier: Apache-2.0

package bpf

// Compiler and flags come from the Makefile's generate target, which pins them.
//go:generate go tool bpf2go -target bpfel -output-dir object -go-package object -output-stem schema -type direction -type hook -type identity -type policy_id -type drop_reason -type flow_action -type flow_flags -type flow_tcp -type endpoint_flags -type pending_flags -type node_addr_flags -type node_flags -type epoch_slots -type service_scope -type service_flags -type policy_prefix -type policy_verdict -type policy_entry_flags -type event_type -type event -type sweep -type route_flags -type node_tunnel_flags -type overlay_vni -type backend_list -type service_backend_flags -type service_addr -type host_port_numbers dp ../../bpf/schema.bpf.c
//go:generate go tool bpf2go -target bpfel -output-dir object -go-package object -no-global-types -output-stem pod pod ../../bpf/pod.bpf.c
//go:generate go tool bpf2go -target bpfel -output-dir object -go-package object -no-global-types -output-stem netdev netdev ../../bpf/netdev.bpf.c
//go:generate go tool bpf2go -target bpfel -output-dir object -go-package object -no-global-types -output-stem overlay overlay ../../bpf/overlay.bpf.c
//go:generate go tool bpf2go -target bpfel -output-dir object -go-package object -no-global-types -output-stem host host ../../bpf/host.bpf.c
//go:generate go tool bpf2go -target bpfel -output-dir object -go-package object -no-global-types -output-stem sweep sweep ../../bpf/sweep.bpf.c
//go:generate go run ../../hack/buildid
//go:generate go run ../../hack/schematypes
