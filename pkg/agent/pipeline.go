// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/flow"
	"github.com/margay-cni/margay/pkg/node"
	"github.com/margay-cni/margay/pkg/policy"
	"github.com/margay-cni/margay/pkg/service"
	"github.com/margay-cni/margay/pkg/state"
)

// Delays of the pipeline's own making.
const (
	// retryFirst and retryMax bound how soon a round with a fault is repeated.
	retryFirst = 100 * time.Millisecond
	retryMax   = 5 * time.Second
	// lookAgain is how soon the endpoints are looked at again when a record is there and the plugin's map entry is not yet, or not any more.
	lookAgain = 20 * time.Millisecond
	// settled is the age at which a record's ADD has certainly ended: what it lacks then, nobody else will write.
	settled = 2 * time.Second
)

// snapshotFrom is a snapshot with when it arrived.
type snapshotFrom struct {
	*state.Snapshot
	at time.Time
}

// mirrors are the pipeline's tables.
type mirrors struct {
	policy    *mirror[bpf.PolicyKey, bpf.PolicyEntry]
	ipcache   *mirror[bpf.IPCacheKey, bpf.IPCacheEntry]
	endpoints *mirror[bpf.Addr, bpf.Endpoint]
	pending   *mirror[bpf.PendingKey, bpf.Pending]
	services  *mirror[bpf.FrontendKey, bpf.Service]
	backends  *mirror[bpf.BackendKey, bpf.Backend]
	members   *mirror[bpf.ServiceBackend, uint32]
	maglev    *mirror[bpf.MaglevKey, bpf.MaglevChunk]
	ranges    *mirror[bpf.SourceRangeKey, uint32]
	addrs     *mirror[bpf.ServiceAddrKey, uint32]
	nodeAddrs *mirror[bpf.Addr, uint32]
	nodes     *mirror[uint32, bpf.Node]
	routes    *mirror[bpf.RouteKey, bpf.Route]
	egress    *mirror[uint32, bpf.EgressAddrs]
	reserved  *mirror[uint32, uint64]
	nodeState *mirror[uint32, bpf.NodeState]
}

// condition is what every mirror offers, whatever its types.
type condition interface {
	load(urgent func() bool) error
	begin()
	fault(now time.Time) *Fault
	status() MapStatus
}

func (m *mirrors) all() []condition {
	return []condition{
		m.policy, m.ipcache, m.endpoints, m.pending, m.services, m.backends, m.members, m.nodeAddrs, m.nodes, m.routes, m.egress, m.reserved,
		m.nodeState, m.maglev, m.ranges, m.addrs,
	}
}

func newMirrors(t Tables, log *slog.Logger) mirrors {
	m := mirrors{
		policy:    newMirror("policy", t.Policy, log),
		ipcache:   newMirror("ipcache", t.IPCache, log),
		endpoints: newMirror("endpoints", t.Endpoints, log),
		pending:   newMirror("pending", t.Pending, log),
		services:  newMirror("services", t.Services, log),
		backends:  newMirror("backends", t.Backends, log),
		members:   newMirror("service_backends", t.ServiceBackends, log),
		nodeAddrs: newMirror("node_addrs", t.NodeAddrs, log),
		nodes:     newMirror("nodes", t.Nodes, log),
		routes:    newMirror("routes", t.Routes, log),
		egress:    newMirror("egress_addrs", t.EgressAddrs, log),
		reserved:  newMirror("reserved_ports", t.ReservedPorts, log),
		nodeState: newMirror("node_state", t.NodeState, log),
		maglev:    newMirror("maglev", t.Maglev, log),
		ranges:    newMirror("source_ranges", t.SourceRanges, log),
		addrs:     newMirror("service_addrs", t.ServiceAddrs, log),
	}
	m.leaveHostPorts()
	return m
}

// pipeline turns inputs into map content. All of it belongs to the goroutine that runs it; only the mailboxes and publish cross over.
type pipeline struct {
	node   string
	slices bool // make endpoint slices from selectors
	log    *slog.Logger
	store  *endpoint.Store
	epochs Epochs
	ports  HostPorts
	host   host
	now    func() time.Time
	// incomplete names what the source cannot read yet; while there is any, nothing that a predecessor wrote is taken back.
	incomplete func() []string
	publish    func(Round)
	// network takes what devices and kernel routes should be.
	network func(*wantedNetwork)
	// policyStatus is told what became of ClusterNetworkPolicies.
	policyStatus func(map[string]metav1.Condition)
	resync       time.Duration
	// reach is how other nodes, and what is outside, are reached.
	reach Reach
	// verdicts says that verdict events are wanted.
	verdicts bool
	// serviceCIDRs are the ranges that cluster addresses are taken from: the configured ones, or else those of the snapshot. nodePorts are the
	// addresses that NodePorts are served on.
	serviceCIDRs []netip.Prefix
	cidrsGiven   bool
	nodePorts    NodePortAddresses
	// primaries are the nodes' primary addresses, in the snapshot primariesOf.
	primaries   map[netip.Addr]bool
	primariesOf *state.Snapshot

	// Inputs.
	snapshots mailbox[snapshotFrom]
	recordsIn mailbox[[]*endpoint.Record]
	nodeIn    mailbox[nodeFacts]

	snapshot snapshotFrom
	records  []*endpoint.Record
	facts    *nodeFacts
	// haveRecords says that the records have been listed; changed that there is something to compile, nodesChanged something about nodes.
	haveRecords, changed, nodesChanged bool

	// What is compiled from them.
	policies      *policy.Compiler
	services      *service.Compiler
	nodes         *node.Compiler
	nodeResult    *node.Result
	wantedNetwork *wantedNetwork
	networkOf     networkInputs
	nodesSettled  nodesApplied
	policyResult  *policy.Result
	serviceResult *service.Result
	policyErr     error
	// compiled is what the policies were compiled from.
	compiled      policyInputs
	local         []localPod
	merged        *state.Snapshot
	withRecords   mergedPods
	announceEnd   time.Time // when the first pod that waits is judged by its record; zero: none waits for a time
	wantPolicy    policyMaps
	wantService   serviceMaps
	wantEndpoints map[netip.Addr]wantedEndpoint
	wantHostPorts map[bpf.FrontendKey]wantedHostPort

	// What the kernel holds, and what of it is not settled.
	m      mirrors
	loaded bool
	// applied is the policy result that the kernel held entirely before policyRaised had to be raised; nil = look at the kernel.
	applied      *policy.Result
	policyRaised []uint32
	raise        raise
	routes       string
	soon         bool
	// kept are numbers that must not be forgotten while the source is incomplete. What the maps hold after a round without hold, the
	// compilers remember.
	kept numbers
	// saved is what numbers.json was written for; nil: it has to be written. The others are parts of its text.
	saved                                      *stamp
	serviceNumbers, nodeNumbers, policyNumbers encodedNumbers
	// servicesNamed says that services.json is up to date, rulesNamed the same of rules.json. frontendsSeen grows when a frontend comes or goes.
	servicesNamed, rulesNamed bool
	frontendsSeen             uint64
	// servicePorts are the NodePorts of all services, portsOf the journal of the services that they were collected from.
	servicePorts []portRange
	portsOf      state.Journal[state.Key]

	numbers, raiseFile, serviceFile, ruleFile, nodeNames, nodeFile *savedFile
	numbersErr, namesErr, nodeFileErr                              error
	// sysctlPorts are the ports that the kernel reserves, as read in the last full compare; nil = not read yet.
	sysctlPorts []portRange
	// hostPortsReserved are the hostPorts that the kernel keeps from being chosen, hostPortErr why it does not.
	hostPortsReserved map[uint16]bool
	hostPortErr       error

	// wholeDue says that everything is to be compared with the kernel. loadedUpTo counts the tables that were read for that before it gave
	// way, gaveWay how often it did; wholes counts those that were read to the end. fresh says that something has come in since the last round.
	wholeDue, fresh     bool
	loadedUpTo, gaveWay int
	wholes              int

	round Round
	retry time.Duration
	// memorySettled says that what the start took has been given back.
	memorySettled bool
}

// newPipeline makes a pipeline that has not done anything yet. incomplete is the source's.
func newPipeline(cfg *Config, incomplete func() []string) *pipeline {
	limits := policy.DefaultLimits()
	if n := cfg.MaxEntries["ipcache"]; n > 0 {
		limits.Prefixes = int(n)
	}
	if n := cfg.MaxEntries["policy"]; n > 0 {
		limits.Entries = int(n)
	}
	policies, services := newCompilers(cfg.Node, limits, cfg.ServiceReturn, cfg.LoadBalancing)
	nodes := node.NewCompiler(cfg.Node, cfg.Reach.Mode, cfg.Reach.NonMasquerade, cfg.Reach.Egress)
	if n := cfg.MaxEntries["nodes"]; n > 1 {
		nodes.MaxIndex = uint16(min(n-1, node.MaxIndex))
	}
	file := func(name string) *savedFile { return &savedFile{path: filepath.Join(cfg.Run, name)} }
	return &pipeline{
		node:         cfg.Node,
		slices:       cfg.SelectorSlices,
		log:          cfg.Log,
		store:        endpoint.NewStore(cfg.Run),
		epochs:       cfg.Epochs,
		ports:        cfg.HostPorts,
		host:         systemHost{cfg.Run, cfg.ProcSys},
		now:          time.Now,
		incomplete:   incomplete,
		publish:      func(Round) {},
		network:      func(*wantedNetwork) {},
		policyStatus: func(map[string]metav1.Condition) {},
		reach:        cfg.Reach,
		verdicts:     cfg.VerdictEvents,
		nodes:        nodes,
		resync:       cfg.Resync,
		nodePorts:    cfg.NodePortAddresses,
		serviceCIDRs: cfg.ServiceCIDRs,
		cidrsGiven:   len(cfg.ServiceCIDRs) > 0,
		snapshots:    newMailbox[snapshotFrom](),
		recordsIn:    newMailbox[[]*endpoint.Record](),
		nodeIn:       newMailbox[nodeFacts](),
		policies:     policies,
		services:     services,
		m:            newMirrors(cfg.Tables, cfg.Log),
		numbers:      file(numbersFile),
		raiseFile:    file(raiseFile),
		serviceFile:  file(servicesFile),
		ruleFile:     file(rulesFile),
		nodeNames:    file(flow.NodesFile),
		nodeFile:     file(endpoint.NodeFile),
	}
}

func newCompilers(
	node string, limits policy.Limits, way state.ServiceReturn, balancing state.LoadBalancing,
) (*policy.Compiler, *service.Compiler) {
	policies := policy.NewCompiler()
	policies.Limits = limits
	services := service.NewCompiler(node)
	services.DefaultReturn, services.DefaultBalancing = way, balancing
	return policies, services
}

// work does one round and returns after what time the next one is due if nothing happens, 0 for not at all. whole compares everything
// with the kernel's actual content, which every first round does.
func (p *pipeline) work(whole bool) time.Duration {
	p.round = Round{Started: p.now()}
	p.soon = false
	if !p.announceEnd.IsZero() && !p.now().Before(p.announceEnd) {
		p.changed = true
	}
	for _, m := range p.m.all() {
		m.begin()
	}
	if whole || !p.loaded {
		p.round.Whole = true
		if !p.load() {
			return soonAgain
		}
	}
	if p.loaded {
		p.applyNode()
		p.removeLeaks()
		// The kernel's state is the truth until the source and the records have spoken.
		if p.snapshot.Snapshot != nil && p.haveRecords {
			p.applySource()
		}
	}
	return p.finish()
}

// applySource brings the maps to what snapshot and records say.
func (p *pipeline) applySource() {
	hold := len(p.incomplete()) > 0
	p.round.Held = hold
	if p.changed {
		p.compile()
		p.changed = false
		p.wantNetwork(hold)
		if hold {
			p.keepNumbers()
		} else {
			p.kept = numbers{}
		}
	}
	// The plugin writes this map too.
	if p.m.endpoints.load(nil) != nil {
		return
	}
	p.compareServices()
	p.comparePolicies()
	p.raise.add(p.planServices(hold))
	p.raise.add(raise{Endpoints: p.planPolicy(hold)})
	noted := !p.raise.empty()
	p.saveNumbers()
	compiled := p.now()
	p.applyPolicy(hold)
	p.applyReserved(hold) // before a NodePort can be used
	p.applyServices(hold)
	p.applyHostPorts()
	p.settleServices()
	if noted || !p.raise.empty() {
		p.saveNumbers()
	}
	p.saveNode(hold)
	p.round.Written = p.now()
	p.round.Write = p.round.Written.Sub(compiled)
	p.saveNames() // for people: nothing waits for them
}

// compile runs the compilers over the snapshot and the records. When policies cannot be compiled, the last good result stays in force.
func (p *pipeline) compile() {
	start := p.now()
	s := p.snapshot.Snapshot
	p.local = localPods(p.records, s)
	announced, waiting := p.announced(s)
	s = p.merge(s, announced, waiting)
	if p.slices {
		s = state.WithSelectorSlices(s)
	}
	p.compilePolicies(s, waiting)
	p.takeServiceCIDRs(s)
	p.takeServices(p.services.Update(s))
	p.wantHostPorts = wantedHostPorts(p.records)
	p.merged = s
	p.round.Compiled = true
	p.round.Compile = p.now().Sub(start)
}

// compilePolicies compiles the policies over the merged snapshot, unless nothing that they are about has changed.
func (p *pipeline) compilePolicies(s *state.Snapshot, waiting int) {
	inputs := policyInputs{p.snapshot.Snapshot, p.records, waiting}
	if p.policyErr == nil && p.compiled.same(inputs) {
		return
	}
	p.compiled = inputs
	r, changes, err := p.policies.Update(s)
	if p.policyErr = err; err == nil {
		p.takePolicies(r, changes)
	} else {
		p.log.Error("policies could not be compiled; the last good ones stay in force", "err", p.policyErr)
	}
	if p.wantEndpoints, err = wantedEndpoints(p.local, p.policyResult); err != nil {
		p.log.Error("a record is of no use", "err", err)
	}
}

// finish ends a round: it publishes what happened and says when to try again.
func (p *pipeline) finish() time.Duration {
	p.round.Duration = p.now().Sub(p.round.Started)
	for _, m := range p.m.all() {
		if f := m.fault(p.now()); f != nil {
			p.round.Faults = append(p.round.Faults, *f)
		}
		p.round.Maps = append(p.round.Maps, m.status())
	}
	p.describe()
	p.publish(p.round)
	switch {
	case len(p.round.Faults) > 0 || p.numbersErr != nil || !p.raise.empty():
		p.retry = min(max(2*p.retry, retryFirst), retryMax)
		return p.retry
	case p.soon:
		return lookAgain
	}
	p.retry = 0
	if p.announceEnd.IsZero() {
		return 0
	}
	return max(p.announceEnd.Sub(p.now()), lookAgain)
}

func (p *pipeline) exportNumbers() numbers {
	return numbers{
		Version: numbersVersion,
		Policy:  p.policies.Export(),
		Service: p.services.Export(),
		Node:    p.nodes.Export(),
		Routes:  p.routes,
	}
}

// saveNames writes the files with which margayctl shows names for numbers.
func (p *pipeline) saveNames() {
	if !p.round.Compiled {
		return
	}
	if !p.servicesNamed {
		_, p.namesErr = p.serviceFile.save(serviceNames(p.serviceResult, p.merged))
		p.servicesNamed = p.namesErr == nil
	}
	if p.policyResult != nil && p.namesErr == nil && !p.rulesNamed {
		_, p.namesErr = p.ruleFile.save(ruleNames(p.policyResult))
		p.rulesNamed = p.namesErr == nil
	}
	if p.namesErr != nil {
		p.log.Warn("names for numbers could not be saved", "err", p.namesErr)
	}
}
