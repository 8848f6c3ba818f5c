// SPDX-License-Identifier: Apache-2.0

package object

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/bpf"
)

// TestEnumNames compares the names with the constants that bpf2go generated from the same header: each has one, and it is the
// constant's own, lower-cased and without the prefix.
func TestEnumNames(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "schema_bpfel.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		goType, prefix string
		enum           enum
		marks          []string
	}{
		{"dpDropReason", "DROP_", dropReasonEnum, []string{"DROP_REASONS"}},
		{"dpHook", "HOOK_", hookEnum, nil},
		{"dpDirection", "", directionEnum, nil},
		{"dpEventType", "EVENT_", eventTypeEnum, nil},
		{"dpIdentity", "IDENTITY_", identityEnum, []string{"IDENTITY_FIRST"}},
		{"dpPolicyId", "POLICY_", policyIDEnum, []string{"POLICY_FIRST"}},
		{"dpPolicyVerdict", "VERDICT_", verdictEnum, nil},
		{"dpFlowAction", "FLOW_", flowActionEnum, nil},
		{"dpFlowFlags", "FLOW_", flowFlagEnum, nil},
		{"dpEndpointFlags", "ENDPOINT_", endpointFlagEnum, nil},
		{"dpServiceFlags", "SERVICE_", serviceFlagEnum, nil},
	} {
		t.Run(tc.goType, func(t *testing.T) {
			want := map[uint64]string{}
			for name, value := range constants(t, file, tc.goType) {
				if cName := strings.TrimPrefix(name, tc.goType); !slices.Contains(tc.marks, cName) {
					want[value] = strings.ToLower(strings.TrimPrefix(cName, tc.prefix))
				}
			}
			if len(want) == 0 {
				t.Fatalf("no constants of type %s in the generated file", tc.goType)
			}
			got, err := tc.enum.values()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("names of %s (-want +got):\n%s", tc.goType, diff)
			}
			word := regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
			for v := range want {
				if got := tc.enum.name(v); !word.MatchString(got) {
					t.Errorf("name(%d) = %q, want lower-case words", v, got)
				}
			}
		})
	}
}

func constants(t *testing.T, file *ast.File, goType string) map[string]uint64 {
	t.Helper()
	values := map[string]uint64{}
	for _, decl := range file.Decls {
		gen, ok := decl.(*ast.GenDecl)
		if !ok || gen.Tok != token.CONST {
			continue
		}
		for _, spec := range gen.Specs {
			vs := spec.(*ast.ValueSpec)
			if id, ok := vs.Type.(*ast.Ident); !ok || id.Name != goType {
				continue
			}
			v, err := strconv.ParseUint(vs.Values[0].(*ast.BasicLit).Value, 0, 64)
			if err != nil {
				t.Fatal(err)
			}
			values[vs.Names[0].Name] = v
		}
	}
	return values
}

func TestNames(t *testing.T) {
	for _, tc := range []struct{ name, want, got string }{
		{"reason", "policy", DropReasonName(6)},
		{"reason of two words", "spoofed_address", DropReasonName(4)},
		{"unknown reason", "drop-reason-200", DropReasonName(200)},
		{"the count is no reason", "drop-reason-" + strconv.Itoa(int(dpDropReasonDROP_REASONS)), DropReasonName(uint8(dpDropReasonDROP_REASONS))},
		{"hook", "from_netdev", HookName(3)},
		{"direction", "ingress", DirectionName(uint8(bpf.Ingress))},
		{"event type", "drop", EventTypeName(bpf.EventDrop)},
		{"verdict", "deny", VerdictName(bpf.VerdictDeny)},
		{"wildcard identity", "any", IdentityName(bpf.IdentityAny)},
		{"allocated identity", "identity-17", IdentityName(17)},
		{"policy id", "node_only", PolicyIDName(bpf.PolicyNodeOnly)},
		{"flow action", "to_pod", FlowActionName(bpf.FlowToPod)},
		{"flow flags", "reply,denied", strings.Join(FlowFlagNames(bpf.FlowReply|bpf.FlowDenied), ",")},
		{"unknown flow flag", "flow-flags-32768", strings.Join(FlowFlagNames(1<<15), ",")},
		{"endpoint flags", "adopted,pending", strings.Join(EndpointFlagNames(bpf.EndpointAdopted|bpf.EndpointPending), ",")},
		{"service flags", "drop_external", strings.Join(ServiceFlagNames(bpf.ServiceDropExternal), ",")},
		{"no flags", "", strings.Join(ServiceFlagNames(0), ",")},
	} {
		if tc.got != tc.want {
			t.Errorf("%s = %q, want %q", tc.name, tc.got, tc.want)
		}
	}
}

// TestDropReasons: numbers are never reused and start at 1, so the list is dense.
func TestDropReasons(t *testing.T) {
	got, err := DropReasons()
	if err != nil {
		t.Fatal(err)
	}
	var want []uint8
	for r := uint8(1); r < uint8(dpDropReasonDROP_REASONS); r++ {
		want = append(want, r)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("DropReasons() (-want +got):\n%s", diff)
	}
}
