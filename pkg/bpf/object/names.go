// SPDX-License-Identifier: Apache-2.0

package object

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

// The enums of bpf/types.h: BTF name, the prefix that the values share, and the values that are marks rather than names.
// Each is read from the embedded object's BTF when first asked for: there is no second list that could fall behind.
var (
	dropReasonEnum   = newEnum("drop_reason", "DROP_", "DROP_REASONS")
	hookEnum         = newEnum("hook", "HOOK_")
	directionEnum    = newEnum("direction", "")
	eventTypeEnum    = newEnum("event_type", "EVENT_")
	identityEnum     = newEnum("identity", "IDENTITY_", "IDENTITY_FIRST")
	policyIDEnum     = newEnum("policy_id", "POLICY_", "POLICY_FIRST")
	verdictEnum      = newEnum("policy_verdict", "VERDICT_")
	flowActionEnum   = newEnum("flow_action", "FLOW_")
	flowFlagEnum     = newEnum("flow_flags", "FLOW_")
	endpointFlagEnum = newEnum("endpoint_flags", "ENDPOINT_")
	serviceFlagEnum  = newEnum("service_flags", "SERVICE_")
)

// SchemaTypes is the BTF of the object that defines the types.
var SchemaTypes = sync.OnceValues(func() (*btf.Spec, error) {
	spec, err := loadDp()
	if err != nil {
		return nil, err
	}
	return spec.Types, nil
})

// enum names the values of one C enum.
type enum struct {
	values func() (map[uint64]string, error)
	// kind is what an unknown value is called: kind-7.
	kind string
}

// newEnum describes the enum without reading anything yet: a package that never asks for a name pays nothing at start.
func newEnum(name, prefix string, marks ...string) enum {
	return enum{
		kind: strings.ReplaceAll(name, "_", "-"),
		values: sync.OnceValues(func() (map[uint64]string, error) {
			return enumValues(name, prefix, marks)
		}),
	}
}

// enumValues reads one enum's names from BTF, lower-cased and without the prefix.
func enumValues(name, prefix string, marks []string) (map[uint64]string, error) {
	types, err := SchemaTypes()
	if err != nil {
		return nil, err
	}
	var e *btf.Enum
	if err := types.TypeByName(name, &e); err != nil {
		return nil, fmt.Errorf("look up enum %s: %w", name, err)
	}
	values := make(map[uint64]string, len(e.Values))
	for _, v := range e.Values {
		if !slices.Contains(marks, v.Name) {
			values[v.Value] = strings.ToLower(strings.TrimPrefix(v.Name, prefix))
		}
	}
	return values, nil
}

// name returns the value's name; a value without one, for example from a newer program, is shown by its number.
func (e enum) name(v uint64) string {
	values, err := e.values()
	if s, ok := values[v]; ok && err == nil {
		return s
	}
	return fmt.Sprintf("%s-%d", e.kind, v)
}

// flags returns the names of the bits that are set, lowest first.
func (e enum) flags(v uint64) []string {
	var names []string
	for bit := uint64(1); bit != 0 && bit <= v; bit <<= 1 {
		if v&bit != 0 {
			names = append(names, e.name(bit))
		}
	}
	return names
}

// DropReasonName returns the name of a drop reason as counters and events show it: "policy", "spoofed_address".
func DropReasonName(r uint8) string { return dropReasonEnum.name(uint64(r)) }

// DropReasons returns every drop reason in the order of their numbers, without "none".
func DropReasons() ([]uint8, error) {
	values, err := dropReasonEnum.values()
	if err != nil {
		return nil, err
	}
	var reasons []uint8
	for v := range values {
		if v != 0 {
			reasons = append(reasons, uint8(v))
		}
	}
	slices.Sort(reasons)
	return reasons, nil
}

// HookName returns a hook's name: "from_pod".
func HookName(h uint8) string { return hookEnum.name(uint64(h)) }

// DirectionName returns "egress" or "ingress".
func DirectionName(d uint8) string { return directionEnum.name(uint64(d)) }

// EventTypeName returns "drop" or "verdict".
func EventTypeName(t uint8) string { return eventTypeEnum.name(uint64(t)) }

// VerdictName returns "allow" or "deny".
func VerdictName(v uint32) string { return verdictEnum.name(uint64(v)) }

// IdentityName returns the name of an identity with a fixed meaning ("world", "host", "any"); other identities are "identity-17".
func IdentityName(id uint32) string { return identityEnum.name(uint64(id)) }

// PolicyIDName returns the name of a policy id with a fixed meaning ("none", "node_only"); other ids are "policy-id-17".
func PolicyIDName(id uint32) string { return policyIDEnum.name(uint64(id)) }

// FlowActionName returns what happens to a flow's packets: "to_pod", "to_stack", "to_netdev".
func FlowActionName(a uint8) string { return flowActionEnum.name(uint64(a)) }

// FlowFlagNames returns the names of the flow flags that are set.
func FlowFlagNames(f uint16) []string { return flowFlagEnum.flags(uint64(f)) }

// EndpointFlagNames returns the names of the endpoint flags that are set.
func EndpointFlagNames(f uint32) []string { return endpointFlagEnum.flags(uint64(f)) }

// ServiceFlagNames returns the names of the service flags that are set.
func ServiceFlagNames(f uint32) []string { return serviceFlagEnum.flags(uint64(f)) }
