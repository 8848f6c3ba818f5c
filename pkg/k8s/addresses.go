// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/margay-cni/margay/pkg/state"
)

// serverName is in every API server's certificate, whatever its addresses are: pods verify it by this name.
const serverName = "kubernetes.default.svc"

// RememberedFile is in the state directory and has the API servers' addresses that the cluster itself names. It survives reboots.
const RememberedFile = "apiservers.json"

// rememberedVersion is the layout of remembered.
const rememberedVersion = 1

// remembered is the content of RememberedFile.
type remembered struct {
	Version int              `json:"version"`
	Servers []netip.AddrPort `json:"servers"`
}

// DefaultKubeletKubeconfigs are where kubelet's kubeconfig usually is: kubeadm, k0s, RKE2 and K3s, managed clusters, kubelet's own default.
var DefaultKubeletKubeconfigs = []string{
	"/etc/kubernetes/kubelet.conf",
	"/var/lib/kubelet/kubeconfig",
	"/etc/kubernetes/kubelet.kubeconfig",
	"/etc/kubernetes/kubeconfig",
	"/var/lib/k0s/kubelet.conf",
	"/var/lib/rancher/rke2/agent/kubelet.kubeconfig",
	"/var/lib/rancher/k3s/agent/kubelet.kubeconfig",
}

// serviceKey is the service whose endpoints are the API servers.
var serviceKey = state.Key{Namespace: "default", Name: "kubernetes"}

// parseServer reads the URL of an API server. The certificate has to be valid for its host.
func parseServer(server, from string) (address, error) {
	u, err := url.Parse(server)
	if err != nil {
		return address{}, fmt.Errorf("API server %q: %w", server, err)
	}
	if u.Scheme != "https" || u.Hostname() == "" {
		return address{}, fmt.Errorf("API server %q: want https://HOST[:PORT]", server)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return address{hostPort: net.JoinHostPort(u.Hostname(), port), serverName: u.Hostname(), from: from}, nil
}

// found returns every address at which an API server may be, the best first: what the operator says, alone; else what the cluster said last
// time, where this node's kubelet goes, and the service's own address, which works while somebody else provides it.
func (c *Config) found() ([]address, error) {
	var out []address
	if len(c.Servers) > 0 {
		for _, s := range c.Servers {
			a, err := parseServer(s, "--api-server")
			if err != nil {
				return nil, err
			}
			out = append(out, a)
		}
		return out, nil
	}
	servers, err := readRemembered(c.StateDir)
	if err != nil {
		c.Log.Warn("remembered addresses of API servers are of no use", "err", err)
	}
	out = append(out, namedByCluster(servers)...)
	for _, path := range c.KubeletKubeconfigs {
		a, err := kubeletServer(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.Log.Warn("kubelet's kubeconfig names no API server", "path", path, "err", err)
		}
		if err == nil {
			out = append(out, a)
		}
	}
	if host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT"); host != "" && port != "" {
		out = append(out, address{hostPort: net.JoinHostPort(host, port), serverName: serverName, from: "KUBERNETES_SERVICE_HOST"})
	}
	return distinct(out), nil
}

// namedByCluster turns the endpoints of default/kubernetes into addresses.
func namedByCluster(servers []netip.AddrPort) []address {
	var out []address
	for _, s := range servers {
		out = append(out, address{hostPort: s.String(), serverName: serverName, from: "endpoints of " + serviceKey.String()})
	}
	return out
}

// distinct leaves out what is there already.
func distinct(addresses []address) []address {
	var out []address
	for _, a := range addresses {
		if !slices.ContainsFunc(out, func(b address) bool { return a.hostPort == b.hostPort }) {
			out = append(out, a)
		}
	}
	return out
}

// kubeletServer returns the server in a kubeconfig; nothing else is taken from it. The error wraps fs.ErrNotExist when there is no file.
func kubeletServer(path string) (address, error) {
	file, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return address{}, err
	}
	context := file.Contexts[file.CurrentContext]
	if context == nil || file.Clusters[context.Cluster] == nil {
		return address{}, fmt.Errorf("current context %q has no cluster", file.CurrentContext)
	}
	a, err := parseServer(file.Clusters[context.Cluster].Server, path)
	// Kubelet may verify by what only its file says, an authority or a name. This one is valid everywhere.
	a.serverName = serverName
	return a, err
}

// readRemembered returns what the last agent on this node learned; nothing when there is no file.
func readRemembered(dir string) ([]netip.AddrPort, error) {
	data, err := os.ReadFile(filepath.Join(dir, RememberedFile))
	if errors.Is(err, fs.ErrNotExist) || dir == "" {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read remembered API servers: %w", err)
	}
	var r remembered
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("decode %s: %w", RememberedFile, err)
	}
	if r.Version < 1 || r.Version > rememberedVersion {
		return nil, fmt.Errorf("%s has layout %d, want %d", RememberedFile, r.Version, rememberedVersion)
	}
	return r.Servers, nil
}

// writeRemembered replaces the file: whole or not at all, and on the disk when it returns.
func writeRemembered(dir string, servers []netip.AddrPort) error {
	data, err := json.Marshal(remembered{Version: rememberedVersion, Servers: servers})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make state directory: %w", err)
	}
	path := filepath.Join(dir, RememberedFile)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return fmt.Errorf("remember API servers: %w", err)
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("remember API servers: %w", err)
	}
	return nil
}

// apiServers are the endpoints of default/kubernetes, sorted: where the API servers really are.
func apiServers(slicesByKey map[state.Key]*state.EndpointSlice) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range slicesByKey {
		if s.Service != serviceKey {
			continue
		}
		for _, p := range s.Ports {
			for _, e := range s.Endpoints {
				if p.Protocol == state.TCP && (p.Name == "https" || len(s.Ports) == 1) && e.Serving {
					out = append(out, netip.AddrPortFrom(e.Addr, p.Port))
				}
			}
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
