// SPDX-License-Identifier: Apache-2.0

// Package attach measures what docs/design/0003-attach.md decides on: a pod's two programs as clsact filters, as the agent and the plugin
// attach them, against the same programs as tcx links. It has benchmarks only, and needs root. The figures of that note come from
//
//	go test -run '^$' -bench Attach -benchtime 20x ./test/bench/attach
//	go test -run '^$' -bench Packet -benchtime 40x ./test/bench/attach
//	go test -run '^$' -bench Delete -benchtime 10x ./test/bench/attach
package attach
