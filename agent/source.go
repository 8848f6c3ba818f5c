// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"log/slog"
	"strings"

	"k8s.io/klog/v2"

	"github.com/margay-cni/margay/pkg/agent"
	"github.com/margay-cni/margay/pkg/k8s"
	"github.com/margay-cni/margay/pkg/manifest"
)

// sourceOptions say where the cluster's objects come from.
type sourceOptions struct {
	manifests  string
	kubernetes bool
	kubeconfig string
	servers    list
	stateDir   string
	kubelet    list
}

// list is a flag with commas.
type list []string

// String implements flag.Value.
func (l *list) String() string {
	return strings.Join(*l, ",")
}

// Set implements flag.Value.
func (l *list) Set(s string) error {
	*l = nil
	if s == "" {
		return nil
	}
	*l = strings.Split(s, ",")
	return nil
}

// Get implements flag.Getter.
func (l *list) Get() any {
	return []string(*l)
}

func sourceFlags(f *flag.FlagSet, o *sourceOptions) {
	o.kubelet = k8s.DefaultKubeletKubeconfigs
	f.StringVar(&o.manifests, "manifests", "", "directory of Kubernetes manifests to follow")
	f.BoolVar(&o.kubernetes, "kubernetes", false, "follow the Kubernetes API with the service account of the pod that the agent runs in")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "follow the Kubernetes API with the server and the credentials in this file")
	f.Var(&o.servers, "api-server", "comma-separated URLs of API servers, to use instead of those that are found")
	f.StringVar(&o.stateDir, "state-dir", "/var/lib/margay", "directory for what must survive a reboot: the API servers' addresses; empty: nowhere")
	f.Var(&o.kubelet, "kubelet-kubeconfig", "comma-separated files of kubelet's that may name an API server")
}

// validate wants exactly one source.
func (o *sourceOptions) validate() error {
	api := o.kubernetes || o.kubeconfig != ""
	switch {
	case o.manifests == "" && !api:
		return errors.New("a source is required: --kubernetes, --kubeconfig FILE or --manifests DIR")
	case o.manifests != "" && api:
		return errors.New("--manifests and the Kubernetes API exclude each other: give one source")
	case o.kubernetes && o.kubeconfig != "":
		return errors.New("--kubernetes and --kubeconfig exclude each other: give one kind of credentials")
	case len(o.servers) > 0 && !api:
		return errors.New("--api-server needs --kubernetes or --kubeconfig")
	}
	return nil
}

// String names the source for the log.
func (o *sourceOptions) String() string {
	if o.manifests != "" {
		return o.manifests
	}
	return "Kubernetes API"
}

// source is what there is to follow.
type source struct {
	agent.Source
	// selectorSlices says that no controllers run: endpoint slices are made from services' selectors.
	selectorSlices bool
	// events and statuses are nil where nobody takes them.
	events   *k8s.Events
	statuses *k8s.Statuses
}

// open makes the source. Events and statuses are delivered until ctx ends.
func (o *sourceOptions) open(ctx context.Context, node string, log *slog.Logger) (source, error) {
	if o.manifests != "" {
		return source{Source: manifest.New(o.manifests, node, log), selectorSlices: true}, nil
	}
	klog.SetSlogLogger(log)
	s, err := k8s.New(k8s.Config{
		Node: node, Kubeconfig: o.kubeconfig, Servers: o.servers, StateDir: o.stateDir, KubeletKubeconfigs: o.kubelet,
		UserAgent: "margay-agent/" + buildVersion(), Log: log,
	})
	if err != nil {
		return source{}, err
	}
	events, err := s.Events(ctx)
	if err != nil {
		return source{}, err
	}
	statuses, err := s.Statuses(ctx)
	return source{Source: s, events: events, statuses: statuses}, err
}

// tell has the agent's events and what became of policies delivered, where that is possible.
func (s *source) tell(c *agent.Config) {
	if s.events != nil { // a nil pointer in an interface would not be none
		c.Events, c.Serve.Events = s.events, s.events
	}
	if s.statuses != nil {
		c.PolicyStatus = s.statuses
	}
}
