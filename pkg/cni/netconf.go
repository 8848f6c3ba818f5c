// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/margay-cni/margay/pkg/pins"
)

// What a pod starts with when the agent has published nothing for it (architecture promise 2).
const (
	pendingAuto  = "auto"  // what the summary of its namespace allows
	pendingDeny  = "deny"  // traffic with this node alone, until the agent catches up
	pendingAllow = "allow" // everything, until the agent catches up
	pendingWait  = "wait"  // nothing: ADD waits for the agent, then fails with code 11
)

const (
	defaultPolicyWait = 10 // seconds
	maxPolicyWait     = 45 // seconds, within the runtime's patience
	minMTU            = 68 // bytes, RFC 791
	minMTU6           = 1280
	maxMTU            = 65535
)

// NetConf is the network configuration: what the conflist says about this plugin, and what the runtime adds to it.
// Unknown keys are tolerated, because runtimes and other tools add theirs.
type NetConf struct {
	types.PluginConf

	// MTU of the pod's interface in bytes; 0 means that of the device with the node's default route.
	MTU int `json:"mtu,omitempty"`
	// MAC of the pod's interface; empty means one derived from the container ID.
	MAC string `json:"mac,omitempty"`
	// PolicyPending is auto, deny, allow or wait; empty means auto.
	PolicyPending string `json:"policyPending,omitempty"`
	// PolicyWait is how many seconds policyPending "wait" waits; 0 means 10.
	PolicyWait int `json:"policyWait,omitempty"`
	// BPFFS is the directory of the pins, on a bpf filesystem; empty means /sys/fs/bpf/margay.
	BPFFS string `json:"bpffs,omitempty"`
	// RunDir holds records, locks and leases; empty means /run/margay.
	RunDir string `json:"runDir,omitempty"`
	// LogFile is appended to; empty means standard error, which runtimes usually keep only for failures.
	LogFile string `json:"logFile,omitempty"`
	// LogLevel is debug, info, warn or error; empty means info.
	LogLevel string `json:"logLevel,omitempty"`

	RuntimeConfig runtimeConfig `json:"runtimeConfig,omitzero"`
	Args          configArgs    `json:"args,omitzero"`
}

// runtimeConfig is what the runtime passes for the capabilities that the conflist declares.
type runtimeConfig struct {
	// IPs are requested addresses; the IPAM plugin reads them.
	IPs []string `json:"ips,omitempty"`
	MAC string   `json:"mac,omitempty"`
	// PortMappings are the pod's hostPorts; portMappings reads them. What is wrong in them must not keep DEL from working.
	PortMappings json.RawMessage `json:"portMappings,omitempty"`
	// Bandwidth is refused: a limit that nobody enforces must not look as if it were.
	Bandwidth json.RawMessage `json:"bandwidth,omitempty"`
	// PodAnnotations are accepted and not used yet.
	PodAnnotations map[string]string `json:"io.kubernetes.cri.pod-annotations,omitempty"`
}

// configArgs is the args.cni convention of the CNI project.
type configArgs struct {
	CNI struct {
		// Labels are the pod's labels where no Kubernetes source knows them.
		Labels []label `json:"labels,omitempty"`
		// IPs are requested addresses; the IPAM plugin reads them.
		IPs []string `json:"ips,omitempty"`
		MAC string   `json:"mac,omitempty"`
	} `json:"cni,omitzero"`
}

type label struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// decodeNetConf reads the configuration without judging it, fills in the defaults, and parses prevResult. The error has code 6.
func decodeNetConf(data []byte) (*NetConf, error) {
	c := &NetConf{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, fail(types.ErrDecodingFailure, err, "the network configuration is no JSON that fits; look at the conflist")
	}
	d := pins.DefaultConfig()
	setDefault(&c.PolicyPending, pendingAuto)
	setDefault(&c.BPFFS, d.BPFFS)
	setDefault(&c.RunDir, d.Run)
	setDefault(&c.LogLevel, "info")
	if c.PolicyWait == 0 {
		c.PolicyWait = defaultPolicyWait
	}
	if err := version.ParsePrevResult(&c.PluginConf); err != nil {
		return nil, fail(types.ErrDecodingFailure, err, "prevResult is not a CNI %s result", c.CNIVersion)
	}
	return c, nil
}

func setDefault(s *string, value string) {
	if *s == "" {
		*s = value
	}
}

// validate reports all faults of the configuration at once, with code 7, or code 2 for a field that is not supported.
func (c *NetConf) validate() error {
	if len(c.RuntimeConfig.Bandwidth) > 0 && string(c.RuntimeConfig.Bandwidth) != "null" {
		return fail(types.ErrUnsupportedField, nil,
			"runtimeConfig.bandwidth=%s is not supported: declare the bandwidth capability on the bandwidth plugin, not on margay",
			c.RuntimeConfig.Bandwidth)
	}
	var faults []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fmt.Errorf(format, args...))
		}
	}
	check(c.MTU == 0 || c.MTU >= minMTU && c.MTU <= maxMTU, "mtu: %d is outside %d to %d", c.MTU, minMTU, maxMTU)
	switch c.PolicyPending {
	case pendingAuto, pendingDeny, pendingAllow, pendingWait:
	default:
		check(false, "policyPending: %q is none of auto, deny, allow, wait", c.PolicyPending)
	}
	check(c.PolicyWait > 0 && c.PolicyWait <= maxPolicyWait, "policyWait: %d is outside 1 to %d seconds", c.PolicyWait, maxPolicyWait)
	check(filepath.IsAbs(c.BPFFS), "bpffs: %q is no absolute path", c.BPFFS)
	check(filepath.IsAbs(c.RunDir), "runDir: %q is no absolute path", c.RunDir)
	check(c.LogFile == "" || filepath.IsAbs(c.LogFile), "logFile: %q is no absolute path", c.LogFile)
	if _, err := c.logLevel(); err != nil {
		faults = append(faults, fmt.Errorf("logLevel: %w", err))
	}
	for _, m := range []struct{ key, value string }{
		{"mac", c.MAC}, {"runtimeConfig.mac", c.RuntimeConfig.MAC}, {"args.cni.mac", c.Args.CNI.MAC},
	} {
		if _, err := parseMAC(m.value); err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", m.key, err))
		}
	}
	faults = append(faults, checkIPs("runtimeConfig.ips", c.RuntimeConfig.IPs), checkIPs("args.cni.ips", c.Args.CNI.IPs), c.checkLabels())
	if _, err := c.portMappings(); err != nil {
		faults = append(faults, err)
	}
	check(!strings.ContainsAny(c.IPAM.Type, "/\x00"), "ipam.type: %q is no plugin name", c.IPAM.Type)
	if err := errors.Join(faults...); err != nil {
		return types.NewError(types.ErrInvalidNetworkConfig, "the network configuration is invalid: "+strings.ReplaceAll(err.Error(), "\n", "; "), "")
	}
	return nil
}

// validateAdd adds what only ADD needs: an interface comes either from an earlier plugin of the chain or from us, and ours needs addresses.
func (c *NetConf) validateAdd() error {
	if err := c.validate(); err != nil {
		return err
	}
	switch {
	case c.PrevResult == nil && c.IPAM.Type == "":
		return fail(types.ErrInvalidNetworkConfig, nil,
			`ipam.type is missing: name an IPAM plugin such as "margay-ipam", or put margay after the plugin that makes the interface`)
	case c.PrevResult != nil && c.IPAM.Type != "":
		return fail(types.ErrInvalidNetworkConfig, nil,
			"ipam.type is %q, but an earlier plugin of the list already made the interface: remove ipam here, or move margay to the front",
			c.IPAM.Type)
	}
	return nil
}

func (c *NetConf) checkLabels() error {
	var faults []error
	seen := map[string]bool{}
	for i, l := range c.Args.CNI.Labels {
		switch {
		case l.Key == "":
			faults = append(faults, fmt.Errorf("args.cni.labels[%d]: key is missing", i))
		case seen[l.Key]:
			faults = append(faults, fmt.Errorf("args.cni.labels[%d]: key %q is there twice", i, l.Key))
		}
		seen[l.Key] = true
	}
	return errors.Join(faults...)
}

// checkIPs accepts addresses with and without a prefix length, as the ips capability does.
func checkIPs(key string, ips []string) error {
	var faults []error
	for i, s := range ips {
		if _, err := netip.ParseAddr(s); err == nil {
			continue
		}
		if _, err := netip.ParsePrefix(s); err != nil {
			faults = append(faults, fmt.Errorf("%s[%d]: %q is no IP address", key, i, s))
		}
	}
	return errors.Join(faults...)
}

// parseMAC returns nil for the empty string.
func parseMAC(s string) (net.HardwareAddr, error) {
	if s == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(s)
	switch {
	case err != nil || len(mac) != 6:
		return nil, fmt.Errorf("%q is no Ethernet address", s)
	case mac[0]&1 != 0:
		return nil, fmt.Errorf("%q is a multicast address", s)
	case mac.String() == "00:00:00:00:00:00":
		return nil, fmt.Errorf("%q is the zero address", s)
	}
	return mac, nil
}

// requestedMAC returns the address that somebody asked for, the more specific one first, or nil.
func (c *NetConf) requestedMAC(args podArgs) (net.HardwareAddr, error) {
	for _, s := range []string{c.RuntimeConfig.MAC, c.Args.CNI.MAC, args.mac, c.MAC} {
		mac, err := parseMAC(s)
		if mac != nil || err != nil {
			return mac, err
		}
	}
	return nil, nil
}

func (c *NetConf) labels() map[string]string {
	if len(c.Args.CNI.Labels) == 0 {
		return nil
	}
	out := map[string]string{}
	for _, l := range c.Args.CNI.Labels {
		out[l.Key] = l.Value
	}
	return out
}

func (c *NetConf) logLevel() (slog.Level, error) {
	var l slog.Level
	err := l.UnmarshalText([]byte(c.LogLevel))
	return l, err
}

func (c *NetConf) policyWait() time.Duration {
	return time.Duration(c.PolicyWait) * time.Second
}

func (c *NetConf) datapath() pins.Config {
	d := pins.DefaultConfig()
	d.BPFFS, d.Run = c.BPFFS, c.RunDir
	return d
}

// prevResult returns prevResult in today's form, or nil.
func (c *NetConf) prevResult() (*types100.Result, error) {
	if c.PrevResult == nil {
		return nil, nil
	}
	r, err := types100.NewResultFromResult(c.PrevResult)
	if err != nil {
		return nil, fail(types.ErrDecodingFailure, err, "prevResult is not a CNI %s result", c.CNIVersion)
	}
	return r, nil
}
