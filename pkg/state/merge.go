// SPDX-License-Identifier: Apache-2.0

package state

import (
	"maps"
	"net/netip"
	"slices"
)

// MergePods returns s with what this node's own endpoint records know of its pods. local holds one pod for each record, the oldest
// record first; it needs Key, UID, Labels, IPs and, if known, Ports. node is this node's name.
//
// A pod that s does not know is added as it is: local, and ready, since nobody can say otherwise. A pod that both know keeps what s
// says of it, takes the record's addresses and gains the labels that s has no value for. When both carry a UID and the UIDs differ, the
// record belongs to another incarnation of the pod and is left out. Several records of one pod add up, but a record
// with another UID replaces those before it. Namespaces that s lacks are added.
//
// Neither s nor local is written to; objects are shared between s and the result.
func MergePods(s *Snapshot, node string, local []*Pod) *Snapshot {
	if len(local) == 0 {
		return s
	}
	out := *s
	out.Pods = maps.Clone(s.Pods)
	out.Namespaces = maps.Clone(s.Namespaces)
	out.Journals.Pods, out.Journals.Namespaces = Journal[Key]{}, Journal[string]{}
	for key, record := range byKey(local) {
		out.Pods[key] = mergePod(s.Pods[key], record, node)
		if out.Namespaces[key.Namespace] == nil {
			out.Namespaces[key.Namespace] = ImplicitNamespace(key.Namespace)
		}
	}
	return &out
}

// byKey folds the records of one pod into one.
func byKey(local []*Pod) map[Key]*Pod {
	out := make(map[Key]*Pod, len(local))
	for _, p := range local {
		earlier := out[p.Key]
		if earlier == nil || (p.UID != "" && earlier.UID != "" && p.UID != earlier.UID) {
			clone := *p
			clone.IPs = slices.Clone(p.IPs)
			out[p.Key] = &clone
			continue
		}
		earlier.IPs = appendMissing(earlier.IPs, p.IPs)
		earlier.Ports = appendMissing(slices.Clip(earlier.Ports), p.Ports)
		earlier.Labels = union(p.Labels, earlier.Labels)
		if earlier.UID == "" {
			earlier.UID = p.UID
		}
	}
	return out
}

// mergePod joins what the source knows of a pod, perhaps nothing, with what the record knows. It owns record.
func mergePod(known, record *Pod, node string) *Pod {
	if known == nil {
		record.Node, record.Local, record.Ready = node, true, true
		return record
	}
	if known.UID != "" && record.UID != "" && known.UID != record.UID {
		return known
	}
	out := *known
	out.Node, out.Local = node, true
	out.Labels = union(known.Labels, record.Labels)
	if out.UID == "" {
		out.UID = record.UID
	}
	if len(record.IPs) > 0 {
		out.IPs = record.IPs
	}
	if len(out.Ports) == 0 {
		out.Ports = record.Ports
	}
	return &out
}

// union returns a new map of both; first wins.
func union(first, second map[string]string) map[string]string {
	if len(first)+len(second) == 0 {
		return nil
	}
	out := make(map[string]string, len(first)+len(second))
	maps.Copy(out, second)
	maps.Copy(out, first)
	return out
}

func appendMissing[T comparable](out, more []T) []T {
	for _, v := range more {
		if !slices.Contains(out, v) {
			out = append(out, v)
		}
	}
	return out
}

// addrOf returns the first address of one family.
func addrOf(addrs []netip.Addr, ipv6 bool) (netip.Addr, bool) {
	for _, a := range addrs {
		if a.Unmap().Is6() == ipv6 {
			return a.Unmap(), true
		}
	}
	return netip.Addr{}, false
}
