// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"runtime/debug"
	"time"

	"github.com/margay-cni/margay/pkg/endpoint"
)

// soonAgain is when a whole round goes on that gave way, which it does at most maxGiveWay times.
const (
	soonAgain  = time.Millisecond
	maxGiveWay = 50
)

// run works until ctx ends: one round for whatever has come in since the last one.
func (p *pipeline) run(ctx context.Context) error {
	full := time.NewTicker(p.resync)
	defer full.Stop()
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			p.end()
			return nil
		case s := <-p.snapshots:
			p.takeSnapshot(s)
		case r := <-p.recordsIn:
			p.takeRecords(r)
		case f := <-p.nodeIn:
			p.takeFacts(f)
		case <-full.C:
			p.wholeDue = true
		case <-again.C:
		}
		p.drain()
		if d := p.turn(); d > 0 {
			again.Reset(d)
		}
		p.settleMemory()
	}
}

// turn does the round that is due. What has come in goes before a whole round, which takes a while, unless that has given way too often.
func (p *pipeline) turn() time.Duration {
	whole := p.wholeDue && (!p.fresh || !p.loaded || p.gaveWay >= maxGiveWay)
	if p.wholeDue && !whole {
		p.gaveWay++
	}
	p.fresh = false
	d := p.work(whole)
	if p.wholeDue && p.loaded {
		return soonAgain
	}
	return d
}

// urgent reports whether something has come in that a whole round should give way to. It does so a limited number of times.
func (p *pipeline) urgent() bool {
	if len(p.snapshots)+len(p.recordsIn)+len(p.nodeIn) == 0 || p.gaveWay >= maxGiveWay {
		return false
	}
	p.gaveWay++
	return true
}

// settleMemory gives back, once, what it took to read everything and to compile and write all of it, which is several times what is kept.
// The runtime alone would take minutes.
func (p *pipeline) settleMemory() {
	if !p.memorySettled && !p.round.Written.IsZero() && !p.round.Held {
		p.memorySettled = true
		go debug.FreeOSMemory()
	}
}

// drain takes what else has come in, so that one round serves it all.
func (p *pipeline) drain() {
	for {
		select {
		case s := <-p.snapshots:
			p.takeSnapshot(s)
		case r := <-p.recordsIn:
			p.takeRecords(r)
		case f := <-p.nodeIn:
			p.takeFacts(f)
		default:
			return
		}
	}
}

func (p *pipeline) takeSnapshot(s snapshotFrom) {
	p.snapshot, p.changed, p.nodesChanged, p.fresh = s, true, true, true
}

func (p *pipeline) takeFacts(f nodeFacts) {
	p.facts, p.nodesChanged, p.fresh = &f, true, true
}

func (p *pipeline) takeRecords(r []*endpoint.Record) {
	p.records, p.haveRecords, p.changed, p.fresh = r, true, true, true
}

// load reads every table. It reports false when it has given way to what came in; the next one goes on where it was.
func (p *pipeline) load() bool {
	ok, urgent := true, p.urgent
	for i, m := range p.m.all() {
		if i < p.loadedUpTo {
			continue
		}
		if !p.loaded || !ok { // what failed would be forgotten
			urgent = nil
		}
		err := m.load(urgent)
		if errors.Is(err, errUrgent) {
			p.loadedUpTo = i
			return false
		}
		ok = err == nil && ok
	}
	if ok && !p.loaded {
		p.importNumbers()
		p.loaded = true
	}
	p.applied = nil
	p.wholes++
	p.wholeDue, p.loadedUpTo, p.gaveWay = false, 0, 0
	return true
}
