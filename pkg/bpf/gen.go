// SPDX-License-Identifier: Apache-2.0

package bpf

// The flags live in one place, the Makefile's generate target, which also names the pinned compiler.
//go:generate go tool bpf2go -target bpfel -output-stem schema -type direction -type hook -type identity -type policy_id -type drop_reason -type flow_action -type flow_flags -type flow_tcp -type endpoint_flags -type pending_flags -type node_addr_flags -type service_scope -type service_flags -type policy_prefix -type policy_verdict -type event_type -type event -type sweep dp ../../bpf/schema.bpf.c
