// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"errors"

	"github.com/margay-cni/margay/pkg/state"
)

// ErrLimit is wrapped by Compile's and Update's error when the result is larger than a map.
var ErrLimit = errors.New("more than the map holds")

// Limits are the sizes of the maps that a Result must fit into.
type Limits struct {
	Prefixes int // ipcache
	Entries  int // policy
}

// DefaultLimits are the maps' default sizes.
func DefaultLimits() Limits {
	return Limits{Prefixes: 131072, Entries: 262144}
}

// Compiler turns snapshots into Results. It remembers the numbers that it gave and, for Update, the last snapshot and what it made of it.
type Compiler struct {
	Limits Limits

	identities   *space
	policies     *space
	rules        *space
	compilations uint64
	parsed       uint64 // policies so far

	last *increment
}

// NewCompiler returns a compiler that has given no numbers yet.
func NewCompiler() *Compiler {
	return &Compiler{
		Limits:     DefaultLimits(),
		identities: newSpace("identities", FirstIdentity, AnyIdentity-2, false),
		policies:   newSpace("policy ids", FirstPolicy, MaxPolicy, true),
		rules:      newSpace("rules", 1, AnyIdentity-2, false),
	}
}

// Compile compiles a snapshot. On an error the compiler's numbers stay as they were: go on with the previous Result.
func (c *Compiler) Compile(s *state.Snapshot) (*Result, error) {
	c.last = nil
	r, _, err := c.Update(s)
	c.last = nil // nobody changes this result any more
	return r, err
}

// Update is Compile for whoever follows a source: it works out anew what depends on objects that are others than at the last call (sources
// share what did not change). The result is the same value each time, changed in place; it equals what Compile would have returned. After
// an error, a Compile or an Import everything is compiled anew, into another result. On an error the last result is what it
// was, and so are the numbers.
func (c *Compiler) Update(s *state.Snapshot) (*Result, *Changes, error) {
	in := c.last
	if in == nil {
		in = newIncrement(c)
	}
	c.last = nil
	changes, err := in.update(s)
	if err != nil {
		return nil, nil, err
	}
	c.last = in
	return in.result, changes, nil
}
