// SPDX-License-Identifier: Apache-2.0

package flow

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// Files under the run directory that give numbers of the maps a name. Each is one JSON object from the number, in decimal, to the
// name: {"17": "default/web:http"}. The agent writes them by rename; without them numbers are shown.
const (
	// ServicesFile names service ids: "namespace/name:port".
	ServicesFile = endpoint.ServicesFile
	// RulesFile names rule ids: the policy and rule that the id stands for.
	RulesFile = "rules.json"
	// NodesFile names the other nodes by their index of the map nodes.
	NodesFile = "nodes.json"
)

// Names gives addresses and ids the names that people know. The zero value and a nil *Names know none.
type Names struct {
	records  []*endpoint.Record
	pods     map[netip.Addr]string
	services map[uint32]string
	rules    map[uint32]string
	nodes    map[uint32]string
	// hostPorts are the service ids of the records' hostPorts.
	hostPorts map[uint32]string
}

// LoadNames reads the endpoint records and the agent's name files under the run directory. What is missing is simply not named. A file
// that cannot be read or decoded is reported in the error, and the returned Names still hold everything else.
func LoadNames(run string) (*Names, error) {
	records, errRecords := endpoint.NewStore(run).List()
	n := NewNames(records, nil, nil)
	errServices := readJSON(filepath.Join(run, ServicesFile), &n.services)
	errRules := readJSON(filepath.Join(run, RulesFile), &n.rules)
	errNodes := readJSON(filepath.Join(run, NodesFile), &n.nodes)
	return n, errors.Join(errRecords, errServices, errRules, errNodes)
}

// NewNames returns names for the pods of records, the services and the rules.
func NewNames(records []*endpoint.Record, services, rules map[uint32]string) *Names {
	n := &Names{records: records, pods: map[netip.Addr]string{}, services: services, rules: rules, hostPorts: map[uint32]string{}}
	for _, r := range records {
		for _, p := range r.HostPorts {
			n.hostPorts[p.ID] = fmt.Sprintf("%s:hostPort-%d", PodName(r), p.Host.Port())
		}
		for _, a := range r.Addresses {
			n.pods[a.Unmap()] = PodName(r)
		}
	}
	return n
}

// PodName returns "namespace/name" of the record's pod, or, where the runtime named no pod, the start of the container ID.
func PodName(r *endpoint.Record) string {
	if r.Name == "" {
		return r.ContainerID[:min(12, len(r.ContainerID))]
	}
	return r.Namespace + "/" + r.Name
}

// Records returns the endpoint records that the names come from.
func (n *Names) Records() []*endpoint.Record {
	if n == nil {
		return nil
	}
	return n.records
}

// Pod returns the name of the local pod that has the address, or "".
func (n *Names) Pod(a netip.Addr) string {
	if n == nil {
		return ""
	}
	return n.pods[a.Unmap()]
}

// PodAddrs returns the addresses of the pod with that "namespace/name", in the order of its records.
func (n *Names) PodAddrs(pod string) []netip.Addr {
	var addrs []netip.Addr
	for _, r := range n.Records() {
		if PodName(r) == pod {
			addrs = append(addrs, r.Addresses...)
		}
	}
	return addrs
}

// Service returns the name of a service id, or "". The id of a hostPort has the name of its pod: "shop/web-0:hostPort-8080".
func (n *Names) Service(id uint32) string {
	if n == nil {
		return ""
	}
	return cmp.Or(n.hostPorts[id], n.services[id])
}

// Rule returns the text of a rule id, or "".
func (n *Names) Rule(id uint32) string {
	if n == nil {
		return ""
	}
	return n.rules[id]
}

// Node returns the name of another node by its index, or "".
func (n *Names) Node(index uint32) string {
	if n == nil {
		return ""
	}
	return n.nodes[index]
}

// readJSON decodes a file into v; a missing file leaves v as it is.
func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read names: %w", err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}
