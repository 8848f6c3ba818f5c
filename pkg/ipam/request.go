// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// rangeKeys and knownKeys are the keys of the ipam section, lower case as encoding/json compares them; dataDir is host-local's, accepted so that its
// configurations need no edit, and without meaning here.
var (
	rangeKeys = []string{"subnet", "rangestart", "rangeend", "gateway", "exclude"}
	knownKeys = append([]string{"type", "ranges", "rangesfile", "routes", "resolvconf", "releasecooldown", "strictcooldown", "rundir", "datadir"}, rangeKeys...)
)

// checkKeys refuses keys that nobody would look at: a misspelt "exclude" must not lease the address it was to protect.
func checkKeys(raw json.RawMessage) error {
	var section map[string]json.RawMessage
	if err := json.Unmarshal(raw, &section); err != nil {
		return failf(types.ErrDecodingFailure, "decode ipam section: %v", err)
	}
	if err := unknownKey("ipam.", section, knownKeys); err != nil {
		return err
	}
	for key, value := range section {
		if !strings.EqualFold(key, "ranges") {
			continue
		}
		var sets [][]map[string]json.RawMessage
		if err := json.Unmarshal(value, &sets); err != nil {
			return failf(types.ErrDecodingFailure, "decode ipam.ranges (a list of lists of ranges): %v", err)
		}
		for _, r := range slices.Concat(sets...) {
			if err := unknownKey("ipam.ranges[][].", r, rangeKeys); err != nil {
				return err
			}
		}
	}
	return nil
}

func unknownKey(where string, object map[string]json.RawMessage, known []string) error {
	for _, key := range slices.Sorted(maps.Keys(object)) {
		if !slices.Contains(known, strings.ToLower(key)) {
			return failf(types.ErrUnsupportedField, "unsupported field %s%s = %s", where, key, object[key])
		}
	}
	return nil
}

// loadRequests collects the addresses that were asked for: the "ips" capability, the args.cni.ips convention, and IP= in CNI_ARGS (a
// list separated by commas). CNI_ARGS also names the pod. Keys of CNI_ARGS that mean nothing here are others' business.
func (c *Config) loadRequests(runtimeConfig, args json.RawMessage, cniArgs string) error {
	var fromRuntime struct {
		IPs []string `json:"ips"`
	}
	if len(runtimeConfig) > 0 {
		if err := json.Unmarshal(runtimeConfig, &fromRuntime); err != nil {
			return failf(types.ErrDecodingFailure, "decode runtimeConfig.ips: %v", err)
		}
	}
	var fromArgs struct {
		CNI struct {
			IPs []string `json:"ips"`
		} `json:"cni"`
	}
	if len(args) > 0 {
		if err := json.Unmarshal(args, &fromArgs); err != nil {
			return failf(types.ErrDecodingFailure, "decode args.cni.ips: %v", err)
		}
	}
	for _, s := range slices.Concat(fromRuntime.IPs, fromArgs.CNI.IPs) {
		if err := c.request(s); err != nil {
			return failf(types.ErrInvalidNetworkConfig, "requested address %q: %v", s, err)
		}
	}
	for pair := range strings.SplitSeq(cniArgs, ";") {
		key, value, ok := strings.Cut(pair, "=")
		switch {
		case pair == "":
		case !ok:
			return failf(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: %q is not KEY=VALUE", pair)
		case key == "K8S_POD_NAMESPACE":
			c.podNamespace = value
		case key == "K8S_POD_NAME":
			c.podName = value
		case key == "IP" && value != "":
			for s := range strings.SplitSeq(value, ",") {
				if err := c.request(s); err != nil {
					return failf(types.ErrInvalidEnvironmentVariables, "CNI_ARGS: requested address %q: %v", s, err)
				}
			}
		}
	}
	return nil
}

// request notes an address, with or without a prefix length, once.
func (c *Config) request(s string) error {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "/")
	a, err := parseAddr(s)
	if err != nil {
		return err
	}
	if !slices.Contains(c.requested, a) {
		c.requested = append(c.requested, a)
	}
	return nil
}
