// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"time"

	"github.com/margay-cni/margay/pkg/netns"
)

// clusterKinds are the kinds of traffic that clusters are asked for.
var clusterKinds = kinds[:2]

// comparison is what of two runners is reported beside each other.
type comparison struct {
	section, id, name string
	further           bool               // a further reference of figures that have one
	targets           map[string]float64 // for the rate, by mode, and in inverse for p50; none: no target
	tails             bool               // p99, too
	strict            bool               // with the target of p50
}

// compare reports the laps of one runner beside those of another.
func (b *bench) compare(c comparison, ours, theirs *runner) {
	for _, k := range kinds {
		if len(ours.laps[k.id]) == 0 {
			continue
		}
		target := c.targets[k.mode]
		add := func(what, unit string, target float64, of func(lap) float64) {
			m := &measurement{
				ID: k.id + "." + c.id + what, Section: c.section, Name: k.name + ", " + c.name, Unit: unit, Reference: theirs.name,
				Higher: what == "",
			}
			if what != "" {
				m.Name += ", " + what[1:]
			}
			if c.further {
				m = m.beside(theirs.name)
			}
			m.Target = target
			for i, l := range ours.laps[k.id] {
				m.add(of(l), of(theirs.laps[k.id][i]))
			}
			b.report.add(m)
		}
		add("", k.unit, target, func(l lap) float64 { return l.rate })
		if !k.times {
			continue
		}
		add(".p50", "µs", inverse(target), func(l lap) float64 { return l.p50 })
		if c.tails && c.strict {
			add(".p99", "µs", inverse(target), func(l lap) float64 { return l.p99 })
		} else if c.tails {
			add(".p99", "µs", 0, func(l lap) float64 { return l.p99 })
		}
	}
}

// try connects once and asks for one byte.
func try(c course) error {
	if c.port == 0 {
		c.port = echoPort
	}
	return netns.Do(c.from, func() error {
		conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(c.to, c.port).String(), 200*time.Millisecond)
		if err != nil {
			return err
		}
		defer conn.Close()
		buf := []byte{1}
		_, writing := conn.Write(buf)
		_, reading := conn.Read(buf)
		return errors.Join(writing, conn.SetDeadline(time.Now().Add(200*time.Millisecond)), reading)
	})
}

// inverse is the target of a time whose rate has another one.
func inverse(rate float64) float64 {
	if rate == 0 {
		return 0
	}
	return math.Round(100/rate) / 100
}
