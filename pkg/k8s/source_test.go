// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"testing"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/state"
)

func TestEverythingIsRead(t *testing.T) {
	s := apitest.New(t)
	s.Put(apiNode("n1", "10.244.1.0/24", "fd00:244:1::/64"), apiNamespace("web"), apiPod(1), apiService("api", "10.96.0.1", "fd00:96::1"),
		apiSlice("api-4", "api", "IPv4", "10.0.0.1"), apiSlice("api-6", "api", "IPv6", "fd00::1"))
	r := run(t, inPod(t, s))
	got := r.until("a snapshot", func(*state.Snapshot) bool { return true })
	if got.Pods[key("p1")] == nil || got.Services[key("api")] == nil || len(got.EndpointSlices) != 2 || got.Nodes["n1"] == nil || got.Namespaces["web"] == nil {
		t.Errorf("snapshot = %+v, want everything", got)
	}
}
