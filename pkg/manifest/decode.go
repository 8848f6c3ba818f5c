// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"
	policyv1alpha2 "sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"github.com/margay-cni/margay/pkg/state"
)

// object is one object of a file, converted. value is nil for one that has no place in a snapshot, like a headless service.
type object struct {
	kind  string
	key   state.Key // Namespace is empty where the kind has none.
	line  int
	value any
	node  *yaml.Node // only where somebody may still ask for lines
}

func (o *object) String() string {
	return describe(o.kind, o.key)
}

func describe(kind string, key state.Key) string {
	if key.Namespace == "" {
		return kind + " " + key.Name
	}
	return kind + " " + key.String()
}

// content is what one file's text says.
type content struct {
	objects  []object
	problems []Problem
	// empty says that the text has no object and no word about one, as if its writer had not begun.
	empty bool
}

// parser reads one file.
type parser struct {
	file, node string
	content    content
	ignored    map[string]bool
	// raw is the JSON of the object that is being decoded.
	raw []byte
}

// parse reads the text of a file; node is this node's name. The objects are complete only if no problem is an error.
func parse(file, node string, data []byte) content {
	p := &parser{file: file, node: node, ignored: map[string]bool{}}
	docs, err := documents(data)
	for _, doc := range docs {
		p.document(doc, "", "", 0)
	}
	if err != nil {
		p.report("", *err)
	}
	p.content.empty = err == nil && strings.TrimSpace(string(data)) == ""
	p.findRepeated()
	sortProblems(p.content.problems)
	return p.content
}

func (p *parser) report(object string, f fault) {
	message := f.message
	if f.path != "" {
		message = f.path + ": " + message
	}
	p.content.problems = append(p.content.problems, Problem{File: p.file, Line: f.line, Object: object, Message: message, Severity: f.severity})
}

// document reads one object or a list of them. Items of a typed list may leave out what the list's kind says.
func (p *parser) document(n *yaml.Node, apiVersion, kind string, depth int) {
	line := n.Line
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		p.report("", fault{line: line, message: "is no Kubernetes object: want apiVersion, kind, metadata", severity: Error})
		return
	}
	if _, err := pairs(n, newBudget()); err != nil {
		p.report("", *err)
		return
	}
	if v := text(n, "apiVersion"); v != "" {
		apiVersion = v
	}
	if v := text(n, "kind"); v != "" {
		kind = v
	}
	if apiVersion == "" || kind == "" {
		p.report("", fault{line: line, message: "apiVersion or kind is missing", severity: Error})
		return
	}
	items := child(n, "items")
	if of, isList := strings.CutSuffix(kind, "List"); isList && items != nil && items.Kind == yaml.SequenceNode && depth == 0 {
		if of == "" {
			apiVersion = ""
		}
		for _, item := range items.Content {
			p.document(item, apiVersion, of, depth+1)
		}
		return
	}
	p.object(n, apiVersion, kind)
}

func (p *parser) object(n *yaml.Node, apiVersion, kind string) {
	switch apiVersion + " " + kind {
	case "v1 Namespace":
		decode(p, n, kind, false, checkNamespace, func(o *corev1.Namespace) any { return state.FromNamespace(o) })
	case "v1 Node":
		decode(p, n, kind, false, checkNode, func(o *corev1.Node) any { return state.FromNode(o) })
	case "v1 Pod":
		decode(p, n, kind, true, checkPod, p.fromPod)
	case "v1 Service":
		decode(p, n, kind, true, checkService, func(o *corev1.Service) any { return valueOrNil(state.FromService(o)) })
	case "discovery.k8s.io/v1 EndpointSlice":
		decode(p, n, kind, true, checkEndpointSlice, func(o *discoveryv1.EndpointSlice) any { return valueOrNil(state.FromEndpointSlice(o)) })
	case "networking.k8s.io/v1 NetworkPolicy":
		decode(p, n, kind, true, checkNetworkPolicy, func(o *networkingv1.NetworkPolicy) any { return state.FromNetworkPolicy(o) })
	case "policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy":
		decode(p, n, kind, false, checkClusterNetworkPolicy, p.fromClusterNetworkPolicy)
	default:
		what := kind + " of " + apiVersion
		if !p.ignored[what] {
			p.ignored[what] = true
			p.report("", fault{line: n.Line, message: "objects of kind " + what + " are ignored", severity: Warning})
		}
	}
}

// fromPod converts a pod. Nobody keeps a file's status up to date, so a pod without a Ready condition counts as ready.
func (p *parser) fromPod(pod *corev1.Pod) any {
	out := state.FromPod(pod, p.node)
	isReady := func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady }
	if !slices.ContainsFunc(pod.Status.Conditions, isReady) {
		out.Ready = true
	}
	return out
}

// fromClusterNetworkPolicy converts a policy from what the file says: the typed object has lost the fields that it does not know.
func (p *parser) fromClusterNetworkPolicy(*policyv1alpha2.ClusterNetworkPolicy) any {
	out, err := state.FromClusterNetworkPolicy(p.raw)
	if err != nil {
		return nil // it has no name, which is reported
	}
	return out
}

// valueOrNil turns a nil pointer into a nil interface.
func valueOrNil[T any](v *T) any {
	if v == nil {
		return nil
	}
	return v
}

// decode turns one YAML mapping into an object of the content, or into problems.
func decode[T any, P interface {
	*T
	metav1.Object
}](p *parser, n *yaml.Node, kind string, namespaced bool, check func(*checker, P), convert func(P) any) {
	key := state.Key{Name: text(childOrEmpty(n, "metadata"), "name")}
	if namespaced {
		if key.Namespace = text(childOrEmpty(n, "metadata"), "namespace"); key.Namespace == "" {
			key.Namespace = corev1.NamespaceDefault
		}
	}
	name := describe(kind, key)

	e := encoder{budget: newBudget()}
	if err := e.encode(n, 0); err != nil {
		p.report(name, *err)
		return
	}
	p.raw = e.buf.Bytes()
	var api T
	unknown, err := kjson.UnmarshalStrict(e.buf.Bytes(), &api)
	if err != nil {
		p.report(name, typeFault[T](&e, n, err))
		return
	}
	c := &checker{}
	for _, u := range unknown {
		c.faults = append(c.faults, unknownField(u))
	}
	c.meta(P(&api), namespaced)
	check(c, &api)
	for _, f := range c.faults {
		f.line = locate(n, f.path)
		p.report(name, f)
	}
	o := object{kind: kind, key: key, line: n.Line, value: convert(&api)}
	if kind == "Service" {
		o.node = n
	}
	p.content.objects = append(p.content.objects, o)
}

// childOrEmpty is child that never returns nil.
func childOrEmpty(n *yaml.Node, name string) *yaml.Node {
	if v := child(n, name); v != nil {
		return v
	}
	return &yaml.Node{}
}

// typeFault says where a value of the wrong type stands. The strict decoder keeps the place to itself; the standard one finds the
// same fault again and tells.
func typeFault[T any](e *encoder, n *yaml.Node, err error) fault {
	f := fault{line: n.Line, message: err.Error(), severity: Error}
	var again T
	var wrong *json.UnmarshalTypeError
	if errors.As(json.Unmarshal(e.buf.Bytes(), &again), &wrong) {
		f.message = fmt.Sprintf("%s where %s is wanted", wrong.Value, typeName(wrong.Type))
		f.path = wrong.Field
		// The offset is the whole text's, unless a type decodes itself; then it is no line of a field of that name.
		lines := linesOf(n, wrong.Field)
		if line := e.lineAt(wrong.Offset); slices.Contains(lines, line) {
			f.line = line
		} else if len(lines) > 0 {
			f.line = lines[0]
		}
	}
	return f
}

// typeName is a Go type in words that a person who writes YAML uses.
func typeName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return typeName(t.Elem())
	case reflect.Struct, reflect.Map:
		return "a mapping"
	case reflect.Slice, reflect.Array:
		return "a list"
	case reflect.Bool:
		return "true or false"
	case reflect.String:
		return "text"
	}
	return "a number"
}

func unknownField(err error) fault {
	f := fault{message: err.Error(), severity: Warning}
	if at, ok := err.(kjson.FieldError); ok {
		f.path, f.message = at.FieldPath(), "unknown field, ignored"
	}
	return f
}

// findRepeated reports objects that the file has twice.
func (p *parser) findRepeated() {
	first := map[string]int{}
	for i := range p.content.objects {
		o := &p.content.objects[i]
		if line, twice := first[o.String()]; twice {
			p.report(o.String(), fault{line: o.line, message: fmt.Sprintf("is already in line %d", line), severity: Error})
			continue
		}
		first[o.String()] = o.line
	}
}
