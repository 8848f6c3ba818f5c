// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	_ "embed"
	"fmt"
	"strings"
)

// dnsManifest is CoreDNS with what it needs of the API; the words in capitals are the cluster's.
//
//go:embed coredns.yaml
var dnsManifest string

// installDNS applies the objects of CoreDNS.
func (c *Cluster) installDNS(ctx context.Context) error {
	var addrs []string
	for _, p := range c.ServiceRanges() {
		addrs = append(addrs, fmt.Sprintf("%q", number(p, 10)))
	}
	manifest := strings.NewReplacer(
		"FIRST", fmt.Sprintf("%q", c.DNSAddress()),
		"ADDRESSES", strings.Join(addrs, ", "),
		"FAMILIES", strings.Join(pick(c.Family, "IPv4", "IPv6"), ", "),
		"POLICY", map[bool]string{true: "RequireDualStack", false: "SingleStack"}[c.Family == Dual],
		"DOMAIN", Domain,
	).Replace(dnsManifest)
	return c.Apply(ctx, manifest)
}
