// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// dnsService returns the service of the cluster's DNS.
func dnsService(t *testing.T) place {
	t.Helper()
	var object corev1.Service
	if err := api.get(context.Background(), "Service", "kube-system", "kube-dns", &object); err != nil {
		t.Fatal(err)
	}
	p := place{name: "kube-dns"}
	for _, ip := range object.Spec.ClusterIPs {
		p.addrs = append(p.addrs, netip.MustParseAddr(ip))
	}
	return p
}

// resolver asks the DNS at an address from a place, over udp or tcp.
func resolver(from place, network string, dns netip.AddrPort) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return from.dial(ctx, network, dns.String())
	}}
}

// TestDNS asks for the names of services and pods, from pods on each node, over UDP and TCP, by the DNS' address in each family.
func TestDNS(t *testing.T) {
	s := newSpace(t, nil)
	named := server("web1", 1, labelled("app", "web"))
	named.Spec.Hostname, named.Spec.Subdomain = "first", "headless"
	pods := s.start(named, server("web2", 2, labelled("app", "web")), idle("idle1", 1), idle("idle2", 2))
	web := s.service("web", "web")
	s.service("headless", "web", func(spec *corev1.ServiceSpec) { spec.ClusterIP = corev1.ClusterIPNone })
	s.apply(fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: alias}\nspec: {type: ExternalName, externalName: web.%s.svc.cluster.local}", s.name))
	dns := dnsService(t)
	domain := "." + s.name + ".svc.cluster.local."
	wanted := map[string][]netip.Addr{
		"web" + domain:                          web.addrs,
		"alias" + domain:                        web.addrs,
		"headless" + domain:                     slices.Concat(pods[0].addrs, pods[1].addrs),
		"first.headless" + domain:               pods[0].addrs,
		"kubernetes.default.svc.cluster.local.": nil, // any address: its families are the API server's
		podName(pods[0].addrs[0], s.name) + ".": {pods[0].addrs[0]},
	}
	eachFamily(t, func(t *testing.T, f family) {
		for _, from := range pods[2:] {
			for _, network := range networks {
				r := resolver(from.place, network, f.at(dns, 53))
				for name, want := range wanted {
					lookup(t, from, network, r, name, want)
				}
				eventually(t, "SRV of web", 30*time.Second, func() error {
					ctx, cancel := context.WithTimeout(context.Background(), answerTime)
					defer cancel()
					_, all, err := r.LookupSRV(ctx, "http", "tcp", "web"+domain)
					if err == nil && (len(all) != 1 || all[0].Port != 80 || all[0].Target != "web"+domain) {
						err = fmt.Errorf("got %v, want port 80 of web%s", all, domain)
					}
					return err
				})
			}
		}
	})
}

// podName returns the name that CoreDNS with "pods insecure" has for a pod's address.
func podName(a netip.Addr, namespace string) string {
	return strings.NewReplacer(".", "-", ":", "-").Replace(a.String()) + "." + namespace + ".pod.cluster.local"
}

// lookup waits until a name has the wanted addresses, in any order; with none wanted any will do.
func lookup(t *testing.T, from pod, network string, r *net.Resolver, name string, want []netip.Addr) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s of node%d asks for %s over %s", from.name, from.node, name, network), 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), answerTime)
		defer cancel()
		got, err := r.LookupNetIP(ctx, "ip", name)
		if err != nil {
			return err
		}
		for i := range got {
			got[i] = got[i].Unmap()
		}
		slices.SortFunc(got, netip.Addr.Compare)
		want := slices.SortedFunc(slices.Values(want), netip.Addr.Compare)
		if len(want) > 0 && !slices.Equal(got, want) {
			return fmt.Errorf("got %v, want %v", got, want)
		}
		return nil
	})
}

// TestDNSInPods lets programs in pods resolve by what kubelet writes into resolv.conf: short names, on each node.
func TestDNSInPods(t *testing.T) {
	s := newSpace(t, nil)
	s.start(server("web", 1), server("asker1", 1), server("asker2", 2))
	web := s.service("web", "web")
	for _, asker := range []string{"asker1", "asker2"} {
		eventually(t, asker+" asks the service by its short name", time.Minute, func() error {
			out, err := s.kubectl("exec", asker, "--", "sh", "-c", "curl -sS --max-time 5 http://web/hostname; echo; getent ahosts web."+s.name)
			if err == nil && (!strings.HasPrefix(out, "web\n") || !strings.Contains(out, web.addrs[0].String())) {
				err = fmt.Errorf("got %q, want the name web and the address %s", out, web.addrs[0])
			}
			return err
		})
	}
}
