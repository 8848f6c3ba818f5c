// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
)

// serviceAccountDir is where a pod finds its credentials; the token in it is replaced from time to time.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// rotateAfter is how many requests in a row a server may fail before another one is tried.
const rotateAfter = 5

// scheme has the kinds that are read, and no others: every group costs memory and start-up time.
var (
	scheme = runtime.NewScheme()
	codecs = serializer.NewCodecFactory(scheme)
)

func init() {
	for _, add := range []func(*runtime.Scheme) error{addCore, addDiscovery, addNetworking} {
		if err := add(scheme); err != nil {
			panic(err) // two Go types under one name: this file is wrong
		}
	}
}

func addCore(s *runtime.Scheme) error {
	s.AddKnownTypes(corev1.SchemeGroupVersion, &corev1.Pod{}, &corev1.PodList{}, &corev1.Service{}, &corev1.ServiceList{},
		&corev1.Node{}, &corev1.NodeList{}, &corev1.Namespace{}, &corev1.NamespaceList{}, &corev1.Event{})
	metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
	return nil
}

func addDiscovery(s *runtime.Scheme) error {
	s.AddKnownTypes(discoveryv1.SchemeGroupVersion, &discoveryv1.EndpointSlice{}, &discoveryv1.EndpointSliceList{})
	metav1.AddToGroupVersion(s, discoveryv1.SchemeGroupVersion)
	return nil
}

func addNetworking(s *runtime.Scheme) error {
	s.AddKnownTypes(networkingv1.SchemeGroupVersion, &networkingv1.NetworkPolicy{}, &networkingv1.NetworkPolicyList{},
		&networkingv1.ServiceCIDR{}, &networkingv1.ServiceCIDRList{})
	metav1.AddToGroupVersion(s, networkingv1.SchemeGroupVersion)
	return nil
}

// client asks API servers.
type client struct {
	config *rest.Config
	http   *http.Client
	dialer *dialer
	// found are the addresses that were found at the start.
	found []address
	// learns says that addresses from the cluster go before those.
	learns bool
}

// newClient finds the servers and the credentials. It connects to nobody yet.
func newClient(c *Config) (*client, error) {
	config, addresses, err := c.access()
	if err != nil {
		return nil, err
	}
	if len(addresses) == 0 {
		return nil, errors.New("no address of an API server is known: name one with --api-server")
	}
	config.QPS = -1 // a handful of watches needs no limit; the server has its own
	config.UserAgent = c.UserAgent
	tc, err := config.TransportConfig()
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	tc.TLS.NextProtos = []string{"h2", "http/1.1"}
	secure, err := transport.TLSConfigFor(tc)
	if err != nil {
		return nil, fmt.Errorf("TLS: %w", err)
	}
	if addresses[0].serverName == "" {
		secure = nil
	}
	d := newDialer(addresses, secure)
	base := newTransport(d, secure)
	auth, err := transport.HTTPWrappersForConfig(tc, &rotating{next: base, dialer: d})
	if err != nil {
		return nil, fmt.Errorf("credentials: %w", err)
	}
	return &client{
		config: config, http: &http.Client{Transport: auth}, dialer: d, found: addresses, learns: c.Kubeconfig == "" && len(c.Servers) == 0,
	}, nil
}

func newTransport(d *dialer, secure *tls.Config) *http.Transport {
	return &http.Transport{
		DialContext:           d.dial,
		DialTLSContext:        d.dial,
		TLSClientConfig:       secure,
		ForceAttemptHTTP2:     true,
		ResponseHeaderTimeout: headerTimeout,
		HTTP2:                 &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout},
	}
}

// access returns credentials and addresses.
func (c *Config) access() (*rest.Config, []address, error) {
	if c.Kubeconfig != "" {
		return c.fromKubeconfig()
	}
	token := filepath.Join(c.ServiceAccountDir, "token")
	if _, err := os.Stat(token); err != nil {
		return nil, nil, fmt.Errorf("service account of the pod (outside of a pod use --kubeconfig): %w", err)
	}
	addresses, err := c.found()
	config := &rest.Config{
		Host:            "https://" + serverName,
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(c.ServiceAccountDir, "ca.crt")},
	}
	// Unlike BearerTokenFile this reads the file at once when the server does not believe the token any more.
	config.Wrap(transport.ResettableTokenSourceWrapTransport(transport.NewCachedFileTokenSource(token)))
	return config, addresses, err
}

// fromKubeconfig takes everything from the file. Its server, or the operator's, is the one to use: whoever wrote it knows whether that is
// one machine or a load balancer, and it does not depend on what the agent provides.
func (c *Config) fromKubeconfig() (*rest.Config, []address, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return nil, nil, fmt.Errorf("kubeconfig %s: %w", c.Kubeconfig, err)
	}
	if config.Proxy != nil {
		return nil, nil, fmt.Errorf("kubeconfig %s: proxy-url is not supported", c.Kubeconfig)
	}
	if len(c.Servers) > 0 {
		addresses, err := c.found()
		config.Host = c.Servers[0]
		return config, addresses, err
	}
	u, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, nil, fmt.Errorf("kubeconfig %s: %w", c.Kubeconfig, err)
	}
	if u.Scheme == "http" {
		port := u.Port()
		if port == "" {
			port = "80"
		}
		return config, []address{{hostPort: u.Hostname() + ":" + port, from: c.Kubeconfig}}, nil
	}
	a, err := parseServer(u.Scheme+"://"+u.Host, c.Kubeconfig)
	if config.ServerName != "" {
		a.serverName = config.ServerName
	}
	return config, []address{a}, err
}

// rest returns a client for one group and version that speaks contentType, preferably.
func (c *client) rest(gv schema.GroupVersion, contentType string) (rest.Interface, error) {
	config := rest.CopyConfig(c.config)
	config.GroupVersion = &gv
	config.APIPath = "/apis"
	if gv.Group == "" {
		config.APIPath = "/api"
	}
	config.NegotiatedSerializer = codecs.WithoutConversion()
	config.ContentType = contentType
	config.AcceptContentTypes = contentType
	if contentType != runtime.ContentTypeJSON {
		config.AcceptContentTypes += "," + runtime.ContentTypeJSON
	}
	return rest.RESTClientForConfigAndClient(config, c.http)
}

// outcome is what became of a request on its way, for who sent it: client-go takes some failures for the end of an empty watch.
type outcome struct {
	mu  sync.Mutex
	err error
}

type outcomeKey struct{}

func (o *outcome) failure() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.err
}

// rotating leaves a server that answers nothing but errors, for example because it has lost its storage, and notes outcomes.
type rotating struct {
	next   http.RoundTripper
	dialer *dialer

	mu     sync.Mutex
	failed int
}

// RoundTrip implements http.RoundTripper.
func (r *rotating) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := r.next.RoundTrip(request)
	if o, ok := request.Context().Value(outcomeKey{}).(*outcome); ok {
		o.mu.Lock()
		o.err = err
		o.mu.Unlock()
	}
	if err == nil && r.count(response.StatusCode) {
		r.dialer.leave()
	}
	return response, err
}

// count notes an answer and reports whether it was one failure too many.
func (r *rotating) count(code int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if code < http.StatusInternalServerError {
		r.failed = 0
		return false
	}
	r.failed++
	if r.failed < rotateAfter {
		return false
	}
	r.failed = 0
	return true
}

// withOutcome has the requests of the returned context note theirs.
func withOutcome(ctx context.Context) (context.Context, *outcome) {
	o := &outcome{}
	return context.WithValue(ctx, outcomeKey{}, o), o
}
