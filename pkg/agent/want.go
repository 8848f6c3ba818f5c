// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/pins"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// serviceMaps is what the service maps should hold.
type serviceMaps struct {
	services map[bpf.FrontendKey]bpf.Service
	backends map[bpf.BackendKey]bpf.Backend
	members  map[bpf.ServiceBackend]uint32
	maglev   map[bpf.MaglevKey]bpf.MaglevChunk
	ranges   map[bpf.SourceRangeKey]uint32
	addrs    map[bpf.ServiceAddrKey]uint32
}

// newServiceMaps turns a compilation into map content. cidrs are the ranges that cluster addresses are taken from.
func newServiceMaps(r *service.Result, cidrs ...netip.Prefix) serviceMaps {
	w := serviceMaps{
		services: make(map[bpf.FrontendKey]bpf.Service, len(r.Frontends)),
		backends: make(map[bpf.BackendKey]bpf.Backend, len(r.Serving)),
		members:  make(map[bpf.ServiceBackend]uint32, len(r.Serving)),
		maglev:   map[bpf.MaglevKey]bpf.MaglevChunk{},
		ranges:   make(map[bpf.SourceRangeKey]uint32, len(r.SourceRanges)),
		addrs:    make(map[bpf.ServiceAddrKey]uint32, len(r.ClusterAddrs)+len(cidrs)),
	}
	for f, s := range r.Frontends {
		w.services[bpf.NewFrontendKey(uint8(f.Protocol), f.Addr, f.Port)] = newService(s)
	}
	for list, slots := range r.Lists {
		for slot, b := range slots {
			w.backends[bpf.BackendKey{List: list, Slot: uint32(slot)}] = bpf.NewBackend(b)
		}
	}
	for id, backends := range r.LocalBackends {
		w.addByHash(id, backends)
	}
	for m, in := range r.Serving {
		w.members[bpf.NewServiceBackend(m.Service, m.Backend)] = membership(in)
	}
	for s := range r.SourceRanges {
		w.ranges[bpf.NewSourceRangeKey(s.Service, s.Prefix)] = 1
	}
	w.addTables(r.Tables)
	w.addAddrs(r.ClusterAddrs, cidrs)
	return w
}

// addByHash adds the list by which the backends on this node are found for what other nodes forward: the hash comes with the packet. Of two
// backends with one hash the first has the slot. Slot 0, which is no hash, has the first of all: for a packet that carries no
// hash.
func (w *serviceMaps) addByHash(id uint32, backends []netip.AddrPort) {
	for i, b := range backends {
		k := bpf.BackendKey{List: bpf.BackendByHash | id}
		if i == 0 {
			w.backends[k] = bpf.NewBackend(b)
		}
		k.Slot = bpf.BackendHash(b)
		if _, taken := w.backends[k]; !taken {
			w.backends[k] = bpf.NewBackend(b)
		}
	}
}

func newService(s service.Service) bpf.Service {
	out := bpf.Service{Id: s.ID, List: s.Lists, Count: s.Counts, Affinity: s.AffinitySeconds, Maglev: s.Tables}
	if s.DropEmpty[service.External] {
		out.Flags |= bpf.ServiceDropExternal
	}
	if s.DropEmpty[service.Internal] {
		out.Flags |= bpf.ServiceDropInternal
	}
	if s.ExternalLocal {
		out.Flags |= bpf.ServiceExternalLocal
	}
	if s.InternalLocal {
		out.Flags |= bpf.ServiceInternalLocal
	}
	if s.SourceRanges {
		out.Flags |= bpf.ServiceSourceRanges
	}
	if s.DSR {
		out.Flags |= bpf.ServiceDSR
	}
	return out
}

// serviceNames is the content of services.json: "namespace/name:port" by service id. An unnamed port shows its number.
func serviceNames(r *service.Result, s *state.Snapshot) map[uint32]string {
	names := make(map[uint32]string, len(r.Frontends))
	for _, svc := range r.Frontends {
		names[svc.ID] = fmt.Sprintf("%s:%s", svc.Name, portName(s.Services[svc.Name], svc.PortName))
	}
	return names
}

func portName(s *state.Service, name string) string {
	if name != "" || s == nil {
		return name
	}
	for _, p := range s.Ports {
		if p.Name == "" {
			return fmt.Sprint(p.Port)
		}
	}
	return ""
}

// policyMaps is what the policy maps should hold.
type policyMaps struct {
	policy  map[bpf.PolicyKey]bpf.PolicyEntry
	ipcache map[bpf.IPCacheKey]bpf.IPCacheEntry
	pending map[bpf.PendingKey]bpf.Pending
	// ids has every policy id with entries.
	ids map[uint32]struct{}
}

// newPolicyMaps turns a compilation into map content. scheduled holds the pods that the source knows: pods that only a record names have
// started already, nothing is pending for them.
func newPolicyMaps(r *policy.Result, scheduled map[state.Key]*state.Pod) policyMaps {
	w := policyMaps{
		policy:  make(map[bpf.PolicyKey]bpf.PolicyEntry, len(r.Entries)),
		ipcache: make(map[bpf.IPCacheKey]bpf.IPCacheEntry, len(r.Identities)),
		pending: make(map[bpf.PendingKey]bpf.Pending, len(r.Pods)+len(r.Restricted)+1),
		ids:     map[uint32]struct{}{},
	}
	for k, e := range r.Entries {
		entry := bpf.PolicyEntry{Verdict: uint32(e.Verdict), Rank: e.Rank, RuleId: e.Rule}
		if e.Cluster {
			entry.Flags = bpf.PolicyEntryCluster
		}
		w.policy[newPolicyKey(k)] = entry
		w.ids[k.Policy] = struct{}{}
	}
	for p, id := range r.Identities {
		w.ipcache[bpf.NewIPCacheKey(p)] = bpf.IPCacheEntry{Identity: id}
	}
	for key, a := range r.Pods {
		if pod := scheduled[key]; pod != nil {
			w.pending[pins.PendingKeyOf(key.Namespace, key.Name, pod.UID)] = bpf.Pending{
				Identity: a.Identity, PolicyId: a.Policy, Flags: bpf.PendingPod,
			}
		}
	}
	for namespace, restricted := range r.Restricted {
		w.pending[pins.PendingKeyOf(namespace, "", "")] = summary(restricted)
	}
	w.pending[pins.PendingKeyOf("", "", "")] = summary(r.RestrictedElsewhere)
	return w
}

// summary is what a pod starts with that nothing was published for, in a namespace (or on a node) with or without policies.
func summary(restricted bool) bpf.Pending {
	if restricted {
		return bpf.Pending{
			Identity: bpf.IdentityPodUnknown,
			PolicyId: [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly},
			Flags:    bpf.PendingRestricted,
		}
	}
	return bpf.Pending{Identity: bpf.IdentityPodUnknown, Flags: bpf.PendingOpen}
}

func newPolicyKey(k policy.Key) bpf.PolicyKey {
	return bpf.PolicyKey{
		Prefixlen: bpf.PolicyPrefixBase + uint32(k.Bits),
		PolicyId:  k.Policy,
		Identity:  k.Identity,
		Direction: uint8(k.Direction),
		Proto:     k.Protocol,
		Port:      bpf.Port16(k.Port),
	}
}

func ruleNames(r *policy.Result) map[uint32]string {
	names := make(map[uint32]string, len(r.Rules))
	for id, rule := range r.Rules {
		names[id] = rule.String()
	}
	return names
}

// localPod is a record together with the pod that it is an interface of.
type localPod struct {
	record *endpoint.Record
	key    state.Key
}

// defaultNamespace is where pods live whose runtime named no namespace, as for manifests without one.
const defaultNamespace = "default"

// localPods finds the pod of every record. A record of another incarnation of a known pod (both have UIDs, and they differ) is a pod of its
// own, so that neither gets the other's policy. The records are sorted oldest first, and so is the result.
func localPods(records []*endpoint.Record, s *state.Snapshot) []localPod {
	pods := make([]localPod, 0, len(records))
	for _, r := range records {
		key := state.Key{Namespace: r.Namespace, Name: r.Name}
		if key.Namespace == "" {
			key.Namespace = defaultNamespace
		}
		if key.Name == "" {
			key.Name = r.ContainerID
		}
		if known := s.Pods[key]; known != nil && known.UID != "" && r.UID != "" && known.UID != r.UID {
			key.Name += "/" + r.ContainerID
		}
		pods = append(pods, localPod{record: r, key: key})
	}
	return pods
}

// asPods gives the snapshot's form of the pods: one for each key, with the addresses of all its interfaces.
func asPods(local []localPod) []*state.Pod {
	var (
		out   []*state.Pod
		byKey = map[state.Key]*state.Pod{}
	)
	for _, l := range local {
		pod := byKey[l.key]
		if pod == nil {
			pod = &state.Pod{Key: l.key, UID: l.record.UID, Labels: map[string]string{}}
			byKey[l.key] = pod
			out = append(out, pod)
		}
		for k, v := range l.record.Labels {
			pod.Labels[k] = v
		}
		for _, a := range l.record.Addresses {
			pod.IPs = append(pod.IPs, a.Unmap())
		}
	}
	return out
}

// wantedEndpoint is what the endpoints map should hold for one address.
type wantedEndpoint struct {
	bpf.Endpoint
	record *endpoint.Record
	// classified says that the compilation knows the pod: identity and policy ids count. Otherwise the kernel's stay.
	classified bool
}

// wantedEndpoints gives the entry of every address of every record. Where two records claim an address, the younger one has it.
func wantedEndpoints(local []localPod, r *policy.Result) (map[netip.Addr]wantedEndpoint, error) {
	want := make(map[netip.Addr]wantedEndpoint, 2*len(local))
	var first error
	for _, l := range local {
		base, err := endpointOf(l.record)
		if err != nil {
			if first == nil {
				first = err
			}
			continue
		}
		var assignment policy.Assignment
		var classified bool
		if r != nil {
			assignment, classified = r.Pods[l.key]
		}
		for _, a := range l.record.Addresses {
			a = a.Unmap()
			w := wantedEndpoint{Endpoint: base, record: l.record, classified: classified}
			if classified {
				w.Identity, w.PolicyId = r.Identity(a), assignment.Policy
			}
			want[a] = w
		}
	}
	return want, first
}

// endpointOf is the part of the entry that the record alone decides.
func endpointOf(r *endpoint.Record) (bpf.Endpoint, error) {
	e := bpf.Endpoint{
		Ifindex:  uint32(r.HostIfindex),
		Identity: bpf.IdentityPodUnknown,
		PolicyId: [2]uint32{bpf.PolicyNodeOnly, bpf.PolicyNodeOnly},
	}
	mac, err := net.ParseMAC(r.MAC)
	if err != nil {
		return e, fmt.Errorf("record of %s: %w", r.ContainerID, err)
	}
	hostMAC, err := net.ParseMAC(r.HostMAC)
	if err != nil {
		return e, fmt.Errorf("record of %s: %w", r.ContainerID, err)
	}
	copy(e.Mac[:], mac)
	copy(e.HostMac[:], hostMAC)
	if r.Adopted {
		e.Flags |= bpf.EndpointAdopted
	}
	return e, nil
}
