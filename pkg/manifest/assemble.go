// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"fmt"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// source is the good content of one file.
type source struct {
	file    string
	objects []object
}

// assembler makes a snapshot of several files.
type assembler struct {
	snapshot  *state.Snapshot
	problems  []Problem
	holders   map[string]string
	nodePorts map[nodePort]string
}

type nodePort struct {
	protocol state.Protocol
	port     uint16
}

// assemble joins the contents of files, given in the order of their names: of what contradicts, the first counts.
func assemble(sources []source) (*state.Snapshot, []Problem) {
	a := &assembler{snapshot: state.NewSnapshot(), holders: map[string]string{}, nodePorts: map[nodePort]string{}}
	for _, s := range sources {
		for i := range s.objects {
			a.add(s.file, &s.objects[i])
		}
	}
	return a.snapshot, a.problems
}

func (a *assembler) add(file string, o *object) {
	place := fmt.Sprintf("%s:%d", file, o.line)
	if holder, taken := a.holders[o.String()]; taken {
		a.report(file, o.line, o, fmt.Sprintf("is already in %s, which counts", holder))
		return
	}
	a.holders[o.String()] = place
	switch v := o.value.(type) {
	case *state.Namespace:
		a.snapshot.Namespaces[v.Name] = v
	case *state.Node:
		a.snapshot.Nodes[v.Name] = v
	case *state.Pod:
		a.snapshot.Pods[v.Key] = v
	case *state.Service:
		a.snapshot.Services[v.Key] = a.withFreeNodePorts(file, o, v)
	case *state.EndpointSlice:
		a.snapshot.EndpointSlices[v.Key] = v
	case *state.NetworkPolicy:
		a.snapshot.NetworkPolicies[v.Key] = v
	case *state.ClusterNetworkPolicy:
		a.snapshot.ClusterNetworkPolicies[v.Name] = v
	}
	if ns := o.key.Namespace; ns != "" && a.snapshot.Namespaces[ns] == nil {
		a.snapshot.Namespaces[ns] = state.ImplicitNamespace(ns)
	}
}

// withFreeNodePorts returns the service without the NodePorts that another one has. The rest of it is served: it disturbs nobody. A service
// that loses nothing is the identical one: who compiles it knows by that that it has not changed.
func (a *assembler) withFreeNodePorts(file string, o *object, v *state.Service) *state.Service {
	out := v
	for i, p := range v.Ports {
		if p.NodePort == 0 {
			continue
		}
		n := nodePort{p.Protocol, p.NodePort}
		if holder, taken := a.nodePorts[n]; taken {
			path := fmt.Sprintf("spec.ports[%d].nodePort", i)
			a.report(file, locate(o.node, path), o, fmt.Sprintf("%s: %d with %s belongs to %s", path, p.NodePort, p.Protocol, holder))
			if out == v {
				clone := *v
				clone.Ports = slices.Clone(v.Ports)
				out = &clone
			}
			out.Ports[i].NodePort = 0
			continue
		}
		a.nodePorts[n] = fmt.Sprintf("%s in %s:%d", o, file, o.line)
	}
	return out
}

func (a *assembler) report(file string, line int, o *object, message string) {
	a.problems = append(a.problems, Problem{File: file, Line: line, Object: o.String(), Message: message, Severity: Error})
}
