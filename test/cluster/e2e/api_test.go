// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// apiServer is the cluster's API server. It takes objects as Go values or as YAML, and costs a test no process, as kubectl would.
type apiServer struct {
	base   string
	client *http.Client
}

// errNotFound is wrapped by the error about an object that is not there.
var errNotFound = errors.New("not found")

// connect makes a client from the administrator's kubeconfig. It dials in the control plane's network.
func connect(c *lab.Cluster) (*apiServer, error) {
	var config struct {
		Clusters []struct {
			Cluster struct {
				Server string
				CA     []byte `json:"certificate-authority-data"`
			}
		}
		Users []struct {
			User struct {
				Certificate []byte `json:"client-certificate-data"`
				Key         []byte `json:"client-key-data"`
			}
		}
	}
	b, err := os.ReadFile(c.Kubeconfig())
	if err != nil {
		return nil, err
	}
	if err := yaml.Unmarshal(b, &config); err != nil {
		return nil, fmt.Errorf("decode %s: %w", c.Kubeconfig(), err)
	}
	if len(config.Clusters) != 1 || len(config.Users) != 1 {
		return nil, fmt.Errorf("%s has %d clusters and %d users, want one of each", c.Kubeconfig(), len(config.Clusters), len(config.Users))
	}
	pair, err := tls.X509KeyPair(config.Users[0].User.Certificate, config.Users[0].User.Key)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(config.Clusters[0].Cluster.CA)
	control := machinePlace(c.Control())
	return &apiServer{base: config.Clusters[0].Cluster.Server, client: &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots},
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return control.dial(ctx, network, address)
		},
	}}}, nil
}

func (a *apiServer) do(ctx context.Context, method, path, contentType string, body []byte, into any) error {
	request, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	response, err := a.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if response.StatusCode >= 300 {
		err := fmt.Errorf("%s %s: %s: %s", method, path, response.Status, b)
		if response.StatusCode == http.StatusNotFound {
			err = fmt.Errorf("%w: %w", errNotFound, err)
		}
		return err
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(b, into)
}

// kind is a kind of object and where the API has it.
type kind struct {
	apiVersion, name, plural string
	clusterWide              bool
}

var kinds = map[string]kind{}

func init() {
	for _, k := range []kind{
		{"v1", "Namespace", "namespaces", true},
		{"v1", "Node", "nodes", true},
		{"v1", "Pod", "pods", false},
		{"v1", "Service", "services", false},
		{"v1", "ConfigMap", "configmaps", false},
		{"apps/v1", "Deployment", "deployments", false},
		{"apps/v1", "DaemonSet", "daemonsets", false},
		{"discovery.k8s.io/v1", "EndpointSlice", "endpointslices", false},
		{"networking.k8s.io/v1", "NetworkPolicy", "networkpolicies", false},
		{"policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy", "clusternetworkpolicies", true},
		{"apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", true},
	} {
		kinds[k.name] = k
	}
}

// path returns where an object is, or with name "" all of the namespace, and with namespace "" all of the cluster.
func (k kind) path(namespace, name string) string {
	path := "/apis/" + k.apiVersion
	if k.apiVersion == "v1" {
		path = "/api/v1"
	}
	if !k.clusterWide && namespace != "" {
		path += "/namespaces/" + namespace
	}
	path += "/" + k.plural
	if name != "" {
		path += "/" + name
	}
	return path
}

// get reads an object, or a list if name is "".
func (a *apiServer) get(ctx context.Context, kindName, namespace, name string, into any) error {
	return a.do(ctx, http.MethodGet, kinds[kindName].path(namespace, name), "", nil, into)
}

// remove deletes an object; one that is not there is no error.
func (a *apiServer) remove(ctx context.Context, kindName, namespace, name string) error {
	err := a.do(ctx, http.MethodDelete, kinds[kindName].path(namespace, name), "", nil, nil)
	if errors.Is(err, errNotFound) {
		return nil
	}
	return err
}

// patch changes an object by a JSON merge patch.
func (a *apiServer) patch(ctx context.Context, kindName, namespace, name, patch string) error {
	return a.do(ctx, http.MethodPatch, kinds[kindName].path(namespace, name), "application/merge-patch+json", []byte(patch), nil)
}

// apply makes or changes one object, given in YAML, and reads what became of it into into, unless that is nil.
func (a *apiServer) apply(ctx context.Context, namespace, manifest string, into any) error {
	var object struct {
		metav1.TypeMeta
		metav1.ObjectMeta `json:"metadata"`
	}
	if err := yaml.Unmarshal([]byte(manifest), &object); err != nil {
		return fmt.Errorf("decode manifest: %w", err)
	}
	k, ok := kinds[object.Kind]
	if !ok || k.apiVersion != object.APIVersion {
		return fmt.Errorf("kind %q of %q: not one that tests know", object.Kind, object.APIVersion)
	}
	path := k.path(namespace, object.Name) + "?fieldManager=e2e&force=true"
	return a.do(ctx, http.MethodPatch, path, "application/apply-patch+yaml", []byte(manifest), into)
}

// applyAll applies the objects of a YAML stream.
func (a *apiServer) applyAll(ctx context.Context, namespace, manifests string) error {
	for _, m := range strings.Split(manifests, "\n---\n") {
		if err := a.apply(ctx, namespace, m, nil); err != nil {
			return err
		}
	}
	return nil
}

// create makes a new object.
func (a *apiServer) create(ctx context.Context, kindName, namespace string, object, into any) error {
	b, err := json.Marshal(object)
	if err != nil {
		return err
	}
	return a.do(ctx, http.MethodPost, kinds[kindName].path(namespace, ""), "application/json", b, into)
}
