// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"fmt"
	"strings"
)

// podArgs is what CNI_ARGS says. Runtimes that know pods pass the K8S_POD_ keys.
type podArgs struct {
	namespace string
	name      string
	uid       string
	// mac is the MAC key. The IP key is the IPAM plugin's to read.
	mac string
}

// parseArgs reads CNI_ARGS, "KEY=VALUE;KEY=VALUE". Unknown keys are errors unless IgnoreUnknown is set, which every Kubernetes runtime
// does. All faults are reported at once.
func parseArgs(s string) (podArgs, error) {
	var (
		a             podArgs
		faults        []error
		unknown       []string
		ignoreUnknown bool
	)
	for pair := range strings.SplitSeq(s, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			faults = append(faults, fmt.Errorf("CNI_ARGS: %q is no KEY=VALUE pair", pair))
			continue
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			a.namespace = value
		case "K8S_POD_NAME":
			a.name = value
		case "K8S_POD_UID":
			a.uid = value
		case "MAC":
			a.mac = value
		case "IP", "K8S_POD_INFRA_CONTAINER_ID":
		case "IgnoreUnknown":
			switch strings.ToLower(value) {
			case "1", "true":
				ignoreUnknown = true
			case "0", "false", "":
			default:
				faults = append(faults, fmt.Errorf("CNI_ARGS: IgnoreUnknown=%q is neither 1 nor 0", value))
			}
		default:
			unknown = append(unknown, key)
		}
	}
	if len(unknown) > 0 && !ignoreUnknown {
		faults = append(faults, fmt.Errorf("CNI_ARGS: unknown keys %s (add IgnoreUnknown=1 to have them ignored)", strings.Join(unknown, ", ")))
	}
	return a, errors.Join(faults...)
}
