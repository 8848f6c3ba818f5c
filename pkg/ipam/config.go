// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"cmp"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
)

const (
	// PluginType is the name of the IPAM plugin: what a network configuration has as ipam.type.
	PluginType = "margay-ipam"
	// DefaultRunDir is where Margay keeps what a reboot ends.
	DefaultRunDir = "/run/margay"

	defaultCooldown = 60 * time.Second
)

// Config is one network's configuration as the plugin got it. Make it with LoadConfig; the exported fields may be changed afterwards.
type Config struct {
	// Network is the configuration's name: leases of different networks are independent.
	Network    string
	CNIVersion string
	// RunDir is ipam.runDir, else the top-level runDir, else DefaultRunDir. The state is in <RunDir>/ipam/<Network>.
	RunDir string
	// PollLock waits for the state's lock by trying again and again, which costs no thread when the wait is given up: for processes that live on.
	PollLock bool
	// Valid are GC's cni.dev/valid-attachments; nil when the list is missing, null or empty (libcni makes them look alike).
	Valid []Attachment
	// PrevIPs are the addresses of prevResult; nil without one.
	PrevIPs []netip.Addr

	podNamespace, podName string

	// What follows matters to Add, Check and Status only. fault says what is wrong with it, so that Del and GC are not bothered.
	section   ipamSection
	plan      *plan // nil: take the ranges from rangesFile or the agent's node file
	requested []netip.Addr
	fault     error

	sys system
}

// ipamSection is the configuration's "ipam" object. Its keys are also what Add accepts there: see knownKeys.
type ipamSection struct {
	rangeConf
	Ranges     [][]rangeConf  `json:"ranges"`
	RangesFile string         `json:"rangesFile"`
	Routes     []*types.Route `json:"routes"`
	ResolvConf string         `json:"resolvConf"`
	Cooldown   *uint32        `json:"releaseCooldown"`
	Strict     bool           `json:"strictCooldown"`
}

// LoadConfig decodes a plugin's whole standard input and CNI_ARGS. It fails only when the JSON or the network's name is unusable.
// Everything that Del and GC can do without (ranges, requested addresses, routes) is judged when Add, Check or Status need it, so
// that an edited or broken configuration never keeps an address from being released. Errors have code 6 or 7.
func LoadConfig(stdin []byte, args string) (*Config, error) {
	var doc struct {
		Name          string          `json:"name"`
		CNIVersion    string          `json:"cniVersion"`
		RunDir        string          `json:"runDir"`
		IPAM          json.RawMessage `json:"ipam"`
		Args          json.RawMessage `json:"args"`
		RuntimeConfig json.RawMessage `json:"runtimeConfig"`
		PrevResult    json.RawMessage `json:"prevResult"`
		Valid         []struct {
			ContainerID string `json:"containerID"`
			IfName      string `json:"ifname"`
		} `json:"cni.dev/valid-attachments"`
	}
	if err := json.Unmarshal(stdin, &doc); err != nil {
		return nil, failf(types.ErrDecodingFailure, "decode network configuration: %v", err)
	}
	if err := CheckNetwork(doc.Name); err != nil {
		return nil, err
	}
	var where struct {
		RunDir string `json:"runDir"`
	}
	if len(doc.IPAM) > 0 {
		if err := json.Unmarshal(doc.IPAM, &where); err != nil {
			return nil, failf(types.ErrDecodingFailure, "decode ipam.runDir: %v", err)
		}
	}
	c := &Config{
		Network:    doc.Name,
		CNIVersion: doc.CNIVersion,
		RunDir:     cmp.Or(where.RunDir, doc.RunDir, DefaultRunDir),
		PrevIPs:    prevIPs(doc.PrevResult),
		sys:        realSystem(),
	}
	for _, v := range doc.Valid {
		c.Valid = append(c.Valid, Attachment{ContainerID: v.ContainerID, IfName: v.IfName})
	}
	c.fault = errors.Join(c.loadSection(doc.IPAM), c.loadRequests(doc.RuntimeConfig, doc.Args, args))
	return c, nil
}

// CheckNetwork says whether a network may have that name: letters, digits, '_', '.' and '-', first a letter or a digit, as libcni has it. Such
// a name is also safe as a directory's. The error has code 7.
func CheckNetwork(name string) error {
	for i, c := range []byte(name) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return failf(types.ErrInvalidNetworkConfig, "network name %q has a character that names cannot have", name)
		}
	}
	if name == "" {
		return failf(types.ErrInvalidNetworkConfig, "the network configuration has no name")
	}
	return nil
}

// dir is where the network's lease state is.
func (c *Config) dir() string {
	return filepath.Join(c.RunDir, "ipam", c.Network)
}

func (c *Config) cooldown() time.Duration {
	if c.section.Cooldown == nil {
		return defaultCooldown
	}
	return time.Duration(*c.section.Cooldown) * time.Second
}

// loadSection decodes the ipam object and, where it has ranges, checks them.
func (c *Config) loadSection(raw json.RawMessage) error {
	if len(raw) == 0 {
		return failf(types.ErrInvalidNetworkConfig, "network configuration has no ipam section")
	}
	if err := checkKeys(raw); err != nil {
		return err
	}
	if err := json.Unmarshal(raw, &c.section); err != nil {
		return failf(types.ErrDecodingFailure, "decode ipam section: %v", err)
	}
	confs := c.section.Ranges
	if c.section.Subnet != "" {
		confs = append([][]rangeConf{{c.section.rangeConf}}, confs...)
	} else if s := c.section.rangeConf; s.Start != "" || s.End != "" || s.Gateway != "" || len(s.Exclude) > 0 {
		return failf(types.ErrInvalidNetworkConfig, "ipam: rangeStart, rangeEnd, gateway and exclude need a subnet beside them")
	}
	if len(confs) == 0 {
		return nil
	}
	var err error
	if c.plan, err = parsePlan(confs); err != nil {
		return failf(types.ErrInvalidNetworkConfig, "ipam.ranges: %v", err)
	}
	return nil
}

func parsePlan(confs [][]rangeConf) (*plan, error) {
	sets := make([][]addrRange, len(confs))
	for i, set := range confs {
		for _, conf := range set {
			r, err := conf.parse()
			if err != nil {
				return nil, err
			}
			sets[i] = append(sets[i], r)
		}
	}
	return newPlan(sets)
}

// ready returns the ranges to lease from, or what is wrong with the configuration.
func (c *Config) ready() (*plan, error) {
	if c.fault != nil {
		if e, ok := errors.AsType[*types.Error](c.fault); ok {
			return nil, e
		}
		return nil, c.fault
	}
	if c.plan != nil {
		return c.plan, nil
	}
	return c.foundRanges()
}

// foundRanges makes ranges from the node's pod CIDRs: of rangesFile where the configuration names one, else of what the agent has learnt. Both
// files are replaced by rename, and read anew by every call.
func (c *Config) foundRanges() (*plan, error) {
	path, read := c.section.RangesFile, readRangesFile
	if path == "" {
		path, read = filepath.Join(c.RunDir, nodeFile), readNodeFile
	}
	cidrs, err := read(path)
	if err != nil {
		return nil, err
	}
	p, err := parsePlan(byFamily(cidrs))
	if err != nil {
		return nil, failf(types.ErrInvalidNetworkConfig, "pod CIDRs in %s: %v", path, err)
	}
	return p, nil
}

// readRangesFile reads a list of pod CIDRs that somebody other than the agent keeps.
func readRangesFile(path string) (cidrs []string, err error) {
	if err := readJSON(path, "whoever keeps the file that ipam.rangesFile names has not written it", &cidrs); err != nil {
		return nil, err
	}
	if len(cidrs) == 0 {
		return nil, failf(types.ErrTryAgainLater, "no pod CIDR yet: the list in %s is empty", path)
	}
	return cidrs, nil
}

// nodeFile is endpoint.NodeFile, of which the layouts up to nodeVersion are read here. The two packages do not know each other; a test
// compares.
const (
	nodeFile    = "node.json"
	nodeVersion = 1
)

// readNodeFile reads what the agent says of this node. It stays when the agent ends, and a reboot ends it: until the agent has seen the
// cluster again nobody knows that the ranges are still this node's.
func readNodeFile(path string) ([]string, error) {
	var node struct {
		Version  int      `json:"version"`
		Name     string   `json:"name"`
		PodCIDRs []string `json:"podCIDRs"`
	}
	const cure = "margay-agent writes it as soon as it knows the cluster, so look whether it runs and what it logs; without an agent set ipam.ranges"
	if err := readJSON(path, cure, &node); err != nil {
		return nil, err
	}
	if node.Version < 1 || node.Version > nodeVersion {
		return nil, failf(types.ErrInvalidNetworkConfig, "%s has layout %d, want %d: install plugin and agent of one version", path, node.Version, nodeVersion)
	}
	if len(node.PodCIDRs) == 0 {
		return nil, failf(types.ErrTryAgainLater, "no pod CIDR yet: node %s has none in spec.podCIDRs (the controller manager gives them out"+
			" with --allocate-node-cidrs and --cluster-cidr); or set ipam.ranges", node.Name)
	}
	return node.PodCIDRs, nil
}

// readJSON decodes a file; cure says what to do when it is not there.
func readJSON(path, cure string, into any) error {
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return failf(types.ErrTryAgainLater, "no pod CIDR yet: ipam.ranges is not set and %s does not exist (%s)", path, cure)
	case err != nil:
		return failf(types.ErrIOFailure, "read pod CIDRs: %v", err)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return failf(types.ErrDecodingFailure, "decode pod CIDRs in %s: %v", path, err)
	}
	return nil
}

// byFamily makes one range set for each family, in the order in which the families appear.
func byFamily(cidrs []string) (sets [][]rangeConf) {
	number := map[bool]int{}
	for _, cidr := range cidrs {
		v6 := strings.Contains(cidr, ":")
		if _, ok := number[v6]; !ok {
			number[v6] = len(sets)
			sets = append(sets, nil)
		}
		sets[number[v6]] = append(sets[number[v6]], rangeConf{Subnet: cidr})
	}
	return sets
}

// prevIPs reads the addresses of a previous result of any version from 0.3.0 on. What cannot be read is left out: Check then says
// which address it misses.
func prevIPs(raw json.RawMessage) []netip.Addr {
	var prev struct {
		IPs []struct {
			Address string `json:"address"`
		} `json:"ips"`
	}
	if len(raw) == 0 || json.Unmarshal(raw, &prev) != nil {
		return nil
	}
	var out []netip.Addr
	for _, ip := range prev.IPs {
		if p, err := netip.ParsePrefix(ip.Address); err == nil {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out
}
