// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"slices"

	"github.com/margay-cni/margay/pkg/state"
)

// All traffic on one line: the ports of each protocol that has ports that policies can name, and one point for everything else.
const (
	ports     = 1 << 16
	lineEnd   = 3*ports + 1
	otherwise = 3 * ports
)

// portProtocols are the protocols in their order on the line.
var portProtocols = [3]state.Protocol{state.TCP, state.UDP, state.SCTP}

// span is a piece of the line, from low up to but without high.
type span struct{ low, high uint32 }

// segment is a piece of the line about which is decided.
type segment struct {
	span
	decision
}

// spanOf is where the prefix lies. Its protocol is one of portProtocols.
func spanOf(p portPrefix) span {
	if p.bits == 0 {
		return span{0, lineEnd}
	}
	low := uint32(slices.Index(portProtocols[:], p.protocol))*ports + uint32(p.port)
	return span{low, low + 1<<(portBits-p.bits)}
}

// painting is the line while tiers and rules are asked one after the other: each decides about what is still open.
type painting struct {
	open   []span // sorted and apart, as passed
	passed []span // left to the next tier
	done   []segment
}

func newPainting() *painting {
	return &painting{open: []span{{0, lineEnd}}}
}

// take cuts s out of what is open and returns the pieces.
func (p *painting) take(s span) (taken []span) {
	first, _ := slices.BinarySearchFunc(p.open, s.low, func(o span, low uint32) int {
		if o.high <= low {
			return -1
		}
		return 1
	})
	last := first
	var left []span
	for ; last < len(p.open) && p.open[last].low < s.high; last++ {
		o := p.open[last]
		piece := span{max(o.low, s.low), min(o.high, s.high)}
		taken = append(taken, piece)
		if o.low < piece.low {
			left = append(left, span{o.low, piece.low})
		}
		if piece.high < o.high {
			left = append(left, span{piece.high, o.high})
		}
	}
	if len(taken) > 0 {
		p.open = slices.Replace(p.open, first, last, left...)
	}
	return taken
}

// paint decides about what is open of s.
func (p *painting) paint(s span, d decision) {
	for _, piece := range p.take(s) {
		p.done = append(p.done, segment{piece, d})
	}
}

// pass leaves what is open of s to the next tier.
func (p *painting) pass(s span) {
	p.passed = append(p.passed, p.take(s)...)
}

// nextTier opens what was passed.
func (p *painting) nextTier() {
	p.open, p.passed = append(p.open, p.passed...), nil
	slices.SortFunc(p.open, func(a, b span) int { return cmp.Compare(a.low, b.low) })
	joined := p.open[:0]
	for _, s := range p.open {
		if n := len(joined); n > 0 && joined[n-1].high == s.low {
			joined[n-1].high = s.high
		} else {
			joined = append(joined, s)
		}
	}
	p.open = joined
}

// rest decides about everything that is open.
func (p *painting) rest(d decision) {
	for _, s := range p.open {
		p.done = append(p.done, segment{s, d})
	}
	p.open = nil
}

// segments returns the decided line; neighbours differ.
func (p *painting) segments() []segment {
	slices.SortFunc(p.done, func(a, b segment) int { return cmp.Compare(a.low, b.low) })
	out := p.done[:0]
	for _, s := range p.done {
		if n := len(out); n > 0 && out[n-1].decision == s.decision {
			out[n-1].high = s.high
		} else {
			out = append(out, s)
		}
	}
	return out
}

// within returns the segments that overlap s.
func within(list []segment, s span) []segment {
	first, _ := slices.BinarySearchFunc(list, s.low, func(o segment, low uint32) int {
		if o.high <= low {
			return -1
		}
		return 1
	})
	last := first
	for last < len(list) && list[last].low < s.high {
		last++
	}
	return list[first:last]
}

// prefixDecision is an entry, but for whose it is.
type prefixDecision struct {
	portPrefix
	decision
}

// completePrefixes writes a whole line as prefixes of which the longest match decides.
func completePrefixes(line []segment) []prefixDecision {
	out := []prefixDecision{{portPrefix{}, line[len(line)-1].decision}}
	for _, protocol := range portProtocols {
		n := newPrefixTree(portPrefix{protocol: protocol, bits: protocolBits}, line, nil)
		out = n.write(out, &out[0].decision)
	}
	return out
}

// differingPrefixes writes as little of a line as is needed where what no prefix matches is decided as others say.
func differingPrefixes(line, others []segment) []prefixDecision {
	if slices.Equal(line, others) {
		return nil
	}
	if line[len(line)-1].decision != others[len(others)-1].decision {
		return completePrefixes(line)
	}
	var out []prefixDecision
	for _, protocol := range portProtocols {
		n := newPrefixTree(portPrefix{protocol: protocol, bits: protocolBits}, line, others)
		out = n.write(out, nil)
	}
	return out
}

// prefixTree finds the fewest prefixes by dynamic programming, from the leaves up: a leaf is decided as one, and an inner node takes what
// both halves can do with. (R. Draves and others, "Constructing optimal IP routing tables", INFOCOM 1999, for routes.)
type prefixTree struct {
	prefix portPrefix
	halves [2]*prefixTree // nil: a leaf
	// choices are the decisions that an entry here may carry so that fewest are needed below: below many.
	choices []decision
	below   int
	// same says that others decide the same here. apart is how many entries are needed while none around matches.
	same  bool
	apart int
}

func newPrefixTree(prefix portPrefix, line, others []segment) *prefixTree {
	s := spanOf(prefix)
	line, others = within(line, s), within(others, s)
	n := &prefixTree{prefix: prefix}
	if len(line) == 1 {
		n.choices, n.apart = []decision{line[0].decision}, 1
		if n.same = len(others) == 1 && others[0].decision == line[0].decision; n.same {
			n.apart = 0
		}
		return n
	}
	for i := range n.halves {
		half := portPrefix{protocol: prefix.protocol, port: prefix.port, bits: prefix.bits + 1}
		half.port += uint16(i << (portBits - half.bits))
		n.halves[i] = newPrefixTree(half, line, others)
	}
	left, right := n.halves[0], n.halves[1]
	n.below = left.below + right.below
	for _, d := range left.choices {
		if slices.Contains(right.choices, d) {
			n.choices = append(n.choices, d)
		}
	}
	if len(n.choices) == 0 {
		n.below++
		n.choices = append(slices.Clone(left.choices), right.choices...)
	}
	n.same = left.same && right.same
	n.apart = min(1+n.below, left.apart+right.apart)
	return n
}

// write appends the entries. Around is what an entry around this prefix says; nil: there is none.
func (n *prefixTree) write(out []prefixDecision, around *decision) []prefixDecision {
	switch {
	case around == nil && n.same:
		return out
	case around == nil && n.halves[0] != nil && n.halves[0].apart+n.halves[1].apart <= n.below:
		// Nothing here: the halves differ from others in less than an entry for both would take.
	case around == nil || !slices.Contains(n.choices, *around):
		around = &n.choices[0]
		out = append(out, prefixDecision{n.prefix, *around})
	}
	for _, half := range n.halves {
		if half != nil {
			out = half.write(out, around)
		}
	}
	return out
}
