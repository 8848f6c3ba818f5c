// SPDX-License-Identifier: Apache-2.0

package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	kjson "sigs.k8s.io/json"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"
)

// ClusterNetworkPolicy is a policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy. It is cluster-scoped (contract row C1).
type ClusterNetworkPolicy struct {
	Name string
	// Generation is metadata.generation, which a condition in the status names; 0 where nobody counts.
	Generation int64
	Tier       policyv1alpha2.Tier
	Priority   int32
	Subject    policyv1alpha2.ClusterNetworkPolicySubject
	Ingress    []ClusterNetworkPolicyRule
	Egress     []ClusterNetworkPolicyRule
	// Unknown are the paths of what cannot be read outside the rules: fields of a newer version of the API, values of another type.
	Unknown []string
}

// ClusterNetworkPolicyRule is a rule of either direction. Peers and Protocols are what could be read; if Unknown is not empty that is
// not all of them, or not the whole of one, and the rule must fail closed (contract row C5).
type ClusterNetworkPolicyRule struct {
	Name   string
	Action policyv1alpha2.ClusterNetworkPolicyRuleAction
	// Peers are the entries of from or to. Those of from set only what an ingress peer can have.
	Peers []policyv1alpha2.ClusterNetworkPolicyEgressPeer
	// Protocols is nil where the rule has none and so means all traffic.
	Protocols []policyv1alpha2.ClusterNetworkPolicyProtocol
	// Unknown are the paths, from the object's root, of fields of a newer version of the API and of values of another type.
	Unknown []string
}

// FromClusterNetworkPolicy converts a policy from its JSON form. A typed object will not do: it has silently lost the fields that this
// version of the API does not know, and what is left would be less strict than what was meant (contract row C5). The error says that
// raw is no object with a name; everything else that cannot be read is in Unknown.
func FromClusterNetworkPolicy(raw []byte) (*ClusterNetworkPolicy, error) {
	var object struct {
		Metadata struct {
			Name       string `json:"name"`
			Generation int64  `json:"generation"`
		} `json:"metadata"`
		Spec json.RawMessage `json:"spec"`
	}
	if err := kjson.UnmarshalCaseSensitivePreserveInts(raw, &object); err != nil {
		return nil, fmt.Errorf("read ClusterNetworkPolicy: %w", err)
	}
	if object.Metadata.Name == "" {
		return nil, errors.New("read ClusterNetworkPolicy: metadata.name is missing")
	}
	var spec struct {
		Tier     json.RawMessage   `json:"tier"`
		Priority json.RawMessage   `json:"priority"`
		Subject  json.RawMessage   `json:"subject"`
		Ingress  []json.RawMessage `json:"ingress"`
		Egress   []json.RawMessage `json:"egress"`
	}
	out := &ClusterNetworkPolicy{Name: object.Metadata.Name, Generation: object.Metadata.Generation}
	out.Unknown = readKnown(object.Spec, &spec, "spec")
	out.Unknown = append(out.Unknown, readKnown(spec.Tier, &out.Tier, "spec.tier")...)
	out.Unknown = append(out.Unknown, readKnown(spec.Priority, &out.Priority, "spec.priority")...)
	out.Unknown = append(out.Unknown, readKnown(spec.Subject, &out.Subject, "spec.subject")...)
	for i, r := range spec.Ingress {
		out.Ingress = append(out.Ingress, readIngressRule(r, fmt.Sprintf("spec.ingress[%d]", i)))
	}
	for i, r := range spec.Egress {
		out.Egress = append(out.Egress, readEgressRule(r, fmt.Sprintf("spec.egress[%d]", i)))
	}
	return out, nil
}

func readIngressRule(raw []byte, at string) ClusterNetworkPolicyRule {
	var api policyv1alpha2.ClusterNetworkPolicyIngressRule
	unknown := readKnown(raw, &api, at)
	out := ClusterNetworkPolicyRule{Name: api.Name, Action: api.Action, Protocols: api.Protocols, Unknown: unknown}
	for _, p := range api.From {
		out.Peers = append(out.Peers, policyv1alpha2.ClusterNetworkPolicyEgressPeer{Namespaces: p.Namespaces, Pods: p.Pods})
	}
	return out
}

func readEgressRule(raw []byte, at string) ClusterNetworkPolicyRule {
	var api policyv1alpha2.ClusterNetworkPolicyEgressRule
	unknown := readKnown(raw, &api, at)
	return ClusterNetworkPolicyRule{Name: api.Name, Action: api.Action, Peers: api.To, Protocols: api.Protocols, Unknown: unknown}
}

// readKnown decodes raw into v and returns the paths of what v has no place for: unknown fields, or at itself if it is of another type.
func readKnown(raw []byte, v any, at string) []string {
	if len(raw) == 0 {
		return nil // missing: whoever needs it will say so
	}
	strict, err := kjson.UnmarshalStrict(raw, v, kjson.DisallowUnknownFields)
	if err != nil {
		return []string{at}
	}
	var out []string
	for _, e := range strict {
		path := at
		if f, ok := e.(kjson.FieldError); ok {
			path += "." + f.FieldPath()
		}
		out = append(out, path)
	}
	slices.Sort(out)
	return out
}
