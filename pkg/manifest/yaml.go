// SPDX-License-Identifier: Apache-2.0

package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Bounds on what one object may make of itself with aliases, merge keys and nesting.
const (
	maxNodes = 200_000
	maxDepth = 200
)

// budget is how many more nodes may be visited.
type budget int

func newBudget() *budget {
	b := budget(maxNodes)
	return &b
}

func (b *budget) spend(n *yaml.Node) *fault {
	if *b--; *b < 0 {
		return &fault{line: n.Line, message: "too large or nested too deeply", severity: Error}
	}
	return nil
}

// fault is something wrong at a line. path, where known, is the field's, like spec.ports[0].port.
type fault struct {
	line     int
	path     string
	message  string
	severity Severity
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)$`)

// documents splits a file into its YAML documents. Empty ones are left out. At a syntax error it returns what stands before it.
func documents(data []byte) ([]*yaml.Node, *fault) {
	var out []*yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var doc yaml.Node
		err := decoder.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			f := &fault{message: err.Error(), severity: Error}
			if m := yamlLine.FindStringSubmatch(err.Error()); m != nil {
				f.line, _ = strconv.Atoi(m[1])
				f.message = m[2]
			}
			return out, f
		}
		if len(doc.Content) == 1 && doc.Content[0].ShortTag() != "!!null" {
			out = append(out, doc.Content[0])
		}
	}
}

// pair is one entry of a mapping.
type pair struct {
	key, value *yaml.Node
}

func resolve(n *yaml.Node) *yaml.Node {
	if n.Kind == yaml.AliasNode {
		return n.Alias
	}
	return n
}

// pairs lists a mapping's entries, with those of merge keys (<<) that it does not override itself.
func pairs(n *yaml.Node, b *budget) ([]pair, *fault) {
	if err := b.spend(n); err != nil {
		return nil, err
	}
	var own, merged []pair
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.ShortTag() == "!!merge" {
			more, err := mergedPairs(resolve(value), b)
			if err != nil {
				return nil, err
			}
			merged = append(merged, more...)
			continue
		}
		key = resolve(key)
		if key.Kind != yaml.ScalarNode {
			return nil, &fault{line: key.Line, message: "a key must be a word", severity: Error}
		}
		if first, twice := seen[key.Value]; twice {
			message := fmt.Sprintf("%s is already set in line %d", key.Value, first)
			return nil, &fault{line: n.Content[i].Line, message: message, severity: Error}
		}
		seen[key.Value] = n.Content[i].Line
		own = append(own, pair{key, value})
	}
	for _, p := range merged {
		if _, overridden := seen[p.key.Value]; !overridden {
			seen[p.key.Value] = p.key.Line
			own = append(own, p)
		}
	}
	return own, nil
}

func mergedPairs(n *yaml.Node, b *budget) ([]pair, *fault) {
	switch n.Kind {
	case yaml.MappingNode:
		return pairs(n, b)
	case yaml.SequenceNode:
		var out []pair
		for _, item := range n.Content {
			if err := b.spend(item); err != nil {
				return nil, err
			}
			if item = resolve(item); item.Kind == yaml.MappingNode {
				more, err := pairs(item, b)
				if err != nil {
					return nil, err
				}
				out = append(out, more...)
			}
		}
		return out, nil
	}
	return nil, &fault{line: n.Line, message: "only mappings can be merged", severity: Error}
}

// child returns a mapping's value, or nil.
func child(n *yaml.Node, name string) *yaml.Node {
	n = resolve(n)
	if n.Kind != yaml.MappingNode {
		return nil
	}
	entries, _ := pairs(n, newBudget())
	for _, p := range entries {
		if p.key.Value == name {
			return resolve(p.value)
		}
	}
	return nil
}

// text returns a mapping's scalar as text; none is "".
func text(n *yaml.Node, name string) string {
	if v := child(n, name); v != nil && v.Kind == yaml.ScalarNode {
		return v.Value
	}
	return ""
}

// encoder writes a YAML node as JSON and remembers which line each part came from.
type encoder struct {
	buf   bytes.Buffer
	marks []mark
	// budget is shared by all that encode visits.
	budget *budget
}

type mark struct {
	offset, line int
}

// lineAt returns the line that the JSON before an offset came from.
func (e *encoder) lineAt(offset int64) int {
	i, _ := slices.BinarySearchFunc(e.marks, int(offset), func(m mark, at int) int { return m.offset - at })
	if i == 0 {
		return 0
	}
	return e.marks[i-1].line
}

func (e *encoder) encode(n *yaml.Node, depth int) *fault {
	if depth > maxDepth {
		*e.budget = 0
	}
	if err := e.budget.spend(n); err != nil {
		return err
	}
	line := n.Line
	n = resolve(n)
	e.marks = append(e.marks, mark{e.buf.Len(), line})
	switch n.Kind {
	case yaml.MappingNode:
		return e.encodeMapping(n, depth)
	case yaml.SequenceNode:
		e.buf.WriteByte('[')
		for i, item := range n.Content {
			if i > 0 {
				e.buf.WriteByte(',')
			}
			if err := e.encode(item, depth+1); err != nil {
				return err
			}
		}
		e.buf.WriteByte(']')
		return nil
	default:
		return e.encodeScalar(n)
	}
}

func (e *encoder) encodeMapping(n *yaml.Node, depth int) *fault {
	entries, err := pairs(n, e.budget)
	if err != nil {
		return err
	}
	e.buf.WriteByte('{')
	for i, p := range entries {
		if i > 0 {
			e.buf.WriteByte(',')
		}
		e.value(p.key.Value)
		e.buf.WriteByte(':')
		if err := e.encode(p.value, depth+1); err != nil {
			return err
		}
	}
	e.buf.WriteByte('}')
	return nil
}

func (e *encoder) encodeScalar(n *yaml.Node) *fault {
	var err error
	switch n.ShortTag() {
	case "!!null":
		e.buf.WriteString("null")
	case "!!bool":
		var v bool
		err = n.Decode(&v)
		e.value(v)
	case "!!int":
		var i int64
		var u uint64
		if err = n.Decode(&i); err == nil {
			e.value(i)
		} else if err = n.Decode(&u); err == nil {
			e.value(u)
		}
	case "!!float":
		var v float64
		if err = n.Decode(&v); err == nil && (math.IsNaN(v) || math.IsInf(v, 0)) {
			err = errors.New("no finite number")
		} else if err == nil {
			e.value(v)
		}
	default: // Text, also dates: the API has them as text.
		e.value(n.Value)
	}
	if err != nil {
		return &fault{line: n.Line, message: fmt.Sprintf("%s is no number that can be used", n.Value), severity: Error}
	}
	return nil
}

// value writes a string, number or bool, which always have a JSON form.
func (e *encoder) value(v any) {
	b, _ := json.Marshal(v)
	e.buf.Write(b)
}

// locate returns the line of the field at path, or of the deepest part of the path that is there.
func locate(n *yaml.Node, path string) int {
	line := n.Line
	for path != "" {
		n = resolve(n)
		next, at, rest := step(n, path)
		if next == nil {
			return line
		}
		n, line, path = next, at, rest
	}
	return line
}

// step follows the first element of path. Keys may hold dots themselves, so the longest key that fits is taken.
func step(n *yaml.Node, path string) (next *yaml.Node, line int, rest string) {
	switch n.Kind {
	case yaml.SequenceNode:
		index, after, ok := strings.Cut(strings.TrimPrefix(path, "["), "]")
		i, err := strconv.Atoi(index)
		if !ok || err != nil || i < 0 || i >= len(n.Content) {
			return nil, 0, ""
		}
		return n.Content[i], n.Content[i].Line, strings.TrimPrefix(after, ".")
	case yaml.MappingNode:
		best := -1
		entries, _ := pairs(n, newBudget())
		for _, p := range entries {
			after, ok := strings.CutPrefix(path, p.key.Value)
			if ok && len(p.key.Value) > best && (after == "" || after[0] == '.' || after[0] == '[') {
				best = len(p.key.Value)
				next, line, rest = p.value, p.key.Line, strings.TrimPrefix(after, ".")
			}
		}
	}
	return next, line, rest
}

// linesOf returns the lines of every field whose path, without the indices of lists, is this one.
func linesOf(n *yaml.Node, path string) []int {
	n = resolve(n)
	if path == "" {
		return []int{n.Line}
	}
	var out []int
	switch n.Kind {
	case yaml.SequenceNode:
		for _, item := range n.Content {
			out = append(out, linesOf(item, path)...)
		}
	case yaml.MappingNode:
		if next, line, rest := step(n, path); next != nil && rest == "" {
			out = append(out, line)
		} else if next != nil {
			out = linesOf(next, rest)
		}
	}
	return out
}
