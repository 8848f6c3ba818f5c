// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// service is a service with the ports 80/tcp and 80/udp.
type service struct {
	place  // its cluster addresses; nothing can be sent from there
	object *corev1.Service
}

// service makes a service for the pods that are labelled app=NAME: ports 80 over TCP and UDP, in all families of the cluster.
func (s *space) service(name, app string, tweaks ...func(*corev1.ServiceSpec)) service {
	s.t.Helper()
	policy := corev1.IPFamilyPolicySingleStack
	if cluster.Family == lab.Dual {
		policy = corev1.IPFamilyPolicyRequireDualStack
	}
	object := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{
		Selector: map[string]string{"app": app}, IPFamilyPolicy: &policy,
		Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromString("http"), Protocol: corev1.ProtocolTCP},
			{Name: "ask", Port: 80, TargetPort: intstr.FromInt32(udpPort), Protocol: corev1.ProtocolUDP},
		},
	}}
	for _, tweak := range tweaks {
		tweak(&object.Spec)
	}
	result := service{object: &corev1.Service{}, place: place{name: name}}
	s.must(api.create(s.ctx, "Service", s.name, object, result.object))
	for _, a := range result.object.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(a); err == nil { // "None" is no address
			result.addrs = append(result.addrs, addr)
		}
	}
	return result
}

func nodePort(spec *corev1.ServiceSpec) { spec.Type = corev1.ServiceTypeNodePort }

func local(spec *corev1.ServiceSpec) {
	spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

// nodePort returns the NodePort over tcp or udp.
func (s service) nodePort(network string) uint16 {
	for _, p := range s.object.Spec.Ports {
		if (p.Protocol == corev1.ProtocolUDP) == (network == "udp") {
			return uint16(p.NodePort)
		}
	}
	return 0
}

// networks are the protocols that servers answer by.
var networks = []string{"tcp", "udp"}

// portOf returns the port of a server pod over tcp or udp.
func portOf(network string) uint16 {
	if network == "udp" {
		return udpPort
	}
	return httpPort
}

// reach waits until from gets an answer to a question, and returns it.
func reach(t testing.TB, from place, network string, to netip.AddrPort, question string) string {
	t.Helper()
	var answer string
	what := fmt.Sprintf("%s asks %s over %s for %s", from.name, to, network, question)
	eventually(t, what, 30*time.Second, func() (err error) {
		answer, err = from.ask(network, to, question, answerTime)
		return err
	})
	return answer
}
