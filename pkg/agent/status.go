// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"time"

	"github.com/margay-cni/margay/pkg/health"
	"github.com/margay-cni/margay/pkg/state"
)

// Round is one pass of the pipeline, as the status shows it.
type Round struct {
	// Started is when the round began, Written when the maps had the last of it; zero if the source has not spoken yet.
	Started time.Time `json:"started"`
	Written time.Time `json:"written,omitzero"`
	// Duration is the whole round, Compile and Write parts of it, in nanoseconds.
	Duration time.Duration `json:"duration"`
	Compile  time.Duration `json:"compile"`
	Write    time.Duration `json:"write"`
	// Compiled says that there was something new to compile, Whole that everything was compared with the kernel.
	Compiled bool `json:"compiled"`
	Whole    bool `json:"whole"`
	// Held says that nothing was taken back because the source cannot read some of its files yet.
	Held bool `json:"held"`
	// Raised are the epochs raised.
	Raised Raised `json:"raised"`
	// Rebuilt and Leaks count repairs: endpoints and hostPorts rebuilt from records, and removed because no record tells of them.
	Rebuilt int `json:"rebuilt"`
	Leaks   int `json:"leaks"`
	// Faults are what keeps the kernel from holding what it should.
	Faults []Fault `json:"faults"`
	// Problems are what was asked for and is not in force, from the compilers.
	Problems []string `json:"problems"`
	// Maps are the fill levels of the maps that the agent writes.
	Maps []MapStatus `json:"maps"`
	// NearlyFull are those of them that have little room left.
	NearlyFull []Level `json:"nearlyFull"`
	// Counts of what is in force.
	Counts Counts `json:"counts"`
	// Devices are the network devices of the node that carry from_netdev and to_netdev.
	Devices []DeviceStatus `json:"devices"`
	// Overlay is the overlay device, absent where there is none.
	Overlay *DeviceStatus `json:"overlay,omitempty"`
}

// Raised counts epochs.
type Raised struct {
	Endpoints int  `json:"endpoints"`
	Services  int  `json:"services"`
	Routes    bool `json:"routes"`
}

// MapStatus is the state of one map.
type MapStatus struct {
	Map     string `json:"map"`
	Entries int    `json:"entries"`
	// Max is the map's size, 0 if unknown.
	Max uint32 `json:"max,omitempty"`
	// Writes counts what this agent wrote and deleted since it started.
	Writes uint64 `json:"writes"`
}

// Counts are numbers of objects.
type Counts struct {
	Pods       int `json:"pods"`
	Endpoints  int `json:"endpoints"`
	Services   int `json:"services"`
	Frontends  int `json:"frontends"`
	Policies   int `json:"policies"`
	Namespaces int `json:"namespaces"`
	Nodes      int `json:"nodes"`
}

// DeviceStatus is a network device of the node, or the overlay device.
type DeviceStatus struct {
	Name    string `json:"name"`
	Ifindex int    `json:"ifindex"`
	// Reason says why it was chosen.
	Reason string `json:"reason"`
	// Error says why the program is not attached.
	Error string `json:"error,omitempty"`
}

// Sweeps is what the periodic sweep of the flow table did.
type Sweeps struct {
	Last    time.Time `json:"last,omitzero"`
	Visited int       `json:"visited"`
	Deleted int       `json:"deleted"`
	Error   string    `json:"error,omitempty"`
}

// Status is the answer of GET /status.
type Status struct {
	Version string    `json:"version"`
	Node    string    `json:"node"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	// Ready says that the source's first snapshot is in the maps.
	Ready bool `json:"ready"`
	// Rounds counts passes of the pipeline; Last is the latest, and LastChange the latest that compiled something.
	Rounds     uint64 `json:"rounds"`
	Last       Round  `json:"last"`
	LastChange Round  `json:"lastChange"`
	// Source are the files and objects that the source cannot use, by file and line.
	Source []state.Problem `json:"source"`
	// Pods are pods without the programs of this build on their device, and who else is there, and those whose MTU cannot follow the node's.
	Pods  []string `json:"pods"`
	Flows Sweeps   `json:"flows"`
	// GC is what was done about pods that are gone.
	GC GarbageCollection `json:"gc"`
	// Conditions are what the agent should answer over TCP and cannot.
	Conditions []health.Condition `json:"conditions"`
}

// fault notes a condition of something that is no mirrored map.
func (p *pipeline) fault(name string, err error) {
	p.log.Error("map could not be written; trying again", "map", name, "err", err)
	p.round.Faults = append(p.round.Faults, Fault{Map: name, Failed: 1, Error: err.Error(), Since: p.now()})
}

// describe fills in what the status shows of the result in force.
func (p *pipeline) describe() {
	r := &p.round
	if p.numbersErr != nil {
		r.Problems = append(r.Problems, "numbers could not be saved: "+p.numbersErr.Error())
	}
	if p.namesErr != nil {
		r.Problems = append(r.Problems, "names could not be saved: "+p.namesErr.Error())
	}
	if p.policyErr != nil {
		r.Problems = append(r.Problems, "policies could not be compiled: "+p.policyErr.Error())
	}
	if p.policyResult != nil {
		for _, err := range p.policyResult.Invalid {
			r.Problems = append(r.Problems, err.Error()) // it names the policy
		}
	}
	if p.serviceResult != nil {
		for _, problem := range p.serviceResult.Problems {
			r.Problems = append(r.Problems, "Service "+problem.Service.String()+": "+problem.Message)
		}
		r.Problems = append(r.Problems, p.hostPortProblems()...)
		r.Counts.Frontends = len(p.serviceResult.Frontends)
	}
	if p.facts != nil {
		r.Problems = append(r.Problems, p.facts.problems...)
	}
	if p.hostPortErr != nil {
		r.Problems = append(r.Problems, "hostPorts could not be kept from the node's own connections: "+p.hostPortErr.Error())
	}
	if p.nodeFileErr != nil {
		r.Problems = append(r.Problems, "what the plugin is told of the node could not be saved: "+p.nodeFileErr.Error())
	}
	if p.nodeResult != nil {
		for _, problem := range p.nodeResult.Problems {
			r.Problems = append(r.Problems, "Node "+problem.Node+": "+problem.Message)
		}
	}
	r.Counts.Endpoints = len(p.records)
	if p.merged != nil {
		r.Counts.Pods = len(p.merged.Pods)
		r.Counts.Services = len(p.merged.Services)
		r.Counts.Policies = len(p.merged.NetworkPolicies) + len(p.merged.ClusterNetworkPolicies)
		r.Counts.Namespaces = len(p.merged.Namespaces)
		r.Counts.Nodes = len(p.merged.Nodes)
	}
}
