// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"math"
	"net"
	"net/netip"
	"time"

	"github.com/margay-cni/margay/pkg/netns"
)

// lane is a course with what was measured on it, round by round.
type lane struct {
	course
	rate, p50, p99 []float64 // 1000/s, µs, µs
}

// inTurns measures every lane once a round. Who goes first changes from round to round, and so does the direction: nobody always follows
// the same one.
func (b *bench) inTurns(ctx context.Context, mode string, lanes ...*lane) error {
	length := 150 * time.Millisecond
	if mode == modeConnects {
		length = 100 * time.Millisecond
	}
	if b.smoke {
		length = 10 * time.Millisecond
	}
	for i := range b.rounds(10, 1) {
		for k := range lanes {
			at := (i + k) % len(lanes)
			if i%2 == 1 {
				at = len(lanes) - 1 - at
			}
			l := lanes[at]
			o, err := runClient(ctx, l.course, mode, length)
			if err != nil {
				return err
			}
			l.rate, l.p50, l.p99 = append(l.rate, o.PerSecond/1000), append(l.p50, o.P50), append(l.p99, o.P99)
		}
	}
	return nil
}

// comparison is what of two lanes is reported beside each other.
type comparison struct {
	section, id, name string
	// rate is the target for the rate, and in inverse for p50; 0: none. strict has p99 to be no worse, too.
	rate   float64
	strict bool
}

// compare reports one lane beside another.
func (b *bench) compare(c comparison, ours, theirs *lane) {
	add := func(id, name, unit string, target float64, ours, reference []float64) {
		b.report.add(&measurement{
			ID: id, Section: c.section, Name: name, Unit: unit, Reference: theirs.name, Target: target, Higher: unit == "1000/s",
			ours: ours, theirs: reference,
		})
	}
	add(c.id, c.name, "1000/s", c.rate, ours.rate, theirs.rate)
	add(c.id+".p50", c.name+", p50", "µs", inverse(c.rate), ours.p50, theirs.p50)
	strict := 0.0
	if c.strict {
		strict = inverse(c.rate)
	}
	add(c.id+".p99", c.name+", p99", "µs", strict, ours.p99, theirs.p99)
}

// try connects once and asks for one byte.
func try(c course) error {
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
