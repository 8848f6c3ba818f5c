// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/flow"
)

// dropTotal is one line of the totals.
type dropTotal struct {
	flow.Drops
	Hint string `json:"hint,omitempty"`
}

type dropList struct {
	Drops []dropTotal `json:"drops"`
}

// followOptions say when a live listing ends and what it shows.
type followOptions struct {
	count    int
	timeout  time.Duration
	since    time.Duration
	pod      string
	reason   string
	verdicts bool
	numeric  bool
}

func newDrops(a *app) *cobra.Command {
	var (
		all, follow bool
		o           followOptions
	)
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "Show dropped packets: totals by reason, or live with --follow",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if follow {
				if _, known := hints[o.reason]; o.reason != "" && !known {
					return fmt.Errorf("there is no drop reason %q; margayctl drops --all lists them", o.reason)
				}
				return a.followDrops(cmd.Context(), o)
			}
			for _, name := range []string{"count", "timeout", "since", "pod", "reason", "verdicts"} {
				if cmd.Flags().Changed(name) {
					return fmt.Errorf("--%s needs --follow: the totals are not kept apart by time or pod", name)
				}
			}
			return a.dropTotals(all)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&all, "all", false, "also show reasons that never occurred")
	f.BoolVarP(&follow, "follow", "f", false, "show sampled drops as they happen")
	f.IntVar(&o.count, "count", 0, "with --follow: end after so many")
	f.DurationVar(&o.timeout, "timeout", 0, "with --follow: end after this time")
	f.DurationVar(&o.since, "since", 0, "with --follow: start with unread events of the last, for example, 1m")
	f.StringVar(&o.pod, "pod", "", "with --follow: only drops from or to this pod (namespace/name)")
	f.StringVar(&o.reason, "reason", "", "with --follow: only drops for this reason, for example policy")
	f.BoolVar(&o.verdicts, "verdicts", false, "with --follow: also show verdicts on new flows, where the programs report them")
	f.BoolVarP(&o.numeric, "numeric", "n", false, "show addresses instead of pod names")
	return cmd
}

// dropTotals shows the counters.
func (a *app) dropTotals(all bool) error {
	s := a.source()
	defer s.close()
	m, err := s.openMap("counters")
	if err != nil {
		return err
	}
	totals, err := flow.DropTotals(m)
	if err != nil {
		return err
	}
	return a.show(newDropList(totals, all))
}

// newDropList keeps what occurred, or all, most packets first.
func newDropList(totals []flow.Drops, all bool) dropList {
	l := dropList{Drops: []dropTotal{}}
	for _, d := range totals {
		if all || d.Packets > 0 {
			l.Drops = append(l.Drops, dropTotal{d, hints[d.Reason]})
		}
	}
	slices.SortStableFunc(l.Drops, func(a, b dropTotal) int { return cmp.Compare(b.Packets, a.Packets) })
	return l
}

func (l dropList) print(w io.Writer) {
	if len(l.Drops) == 0 {
		fmt.Fprintln(w, "no packet was dropped")
		return
	}
	t := newTable("REASON", "DIRECTION", ">PACKETS", ">BYTES", "HINT")
	for _, d := range l.Drops {
		t.add(d.Reason, d.Direction, fmt.Sprint(d.Packets), fmt.Sprint(d.Bytes), d.Hint)
	}
	t.print(w)
}

// followDrops prints events until the count, the timeout or an interrupt ends it.
func (a *app) followDrops(ctx context.Context, o followOptions) (err error) {
	s := a.source()
	defer s.close()
	m, err := s.openMap("events")
	if err != nil {
		return err
	}
	reader, err := flow.NewReader(m, a.node.Run, o.since)
	if errors.Is(err, flow.ErrEventsBusy) {
		return fmt.Errorf("%w; end the other margayctl drops --follow first", err)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reader.Close()) }()
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.timeout)
		defer cancel()
	}
	p := eventPrinter{app: a, options: o, names: a.names()}
	p.start()
	err = reader.Follow(ctx, p.visit)
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		err = nil // the end that was asked for
	}
	return errors.Join(err, p.err)
}

// eventPrinter prints events line by line. The columns have fixed widths, wide enough for most; a longer cell pushes only its own line.
type eventPrinter struct {
	app     *app
	options followOptions
	names   *flow.Names
	loaded  time.Time
	devs    devices
	shown   int
	err     error
}

var eventWidths = []int{12, 20, 9, 6, 28, 28, 0}

func (p *eventPrinter) start() {
	p.loaded = time.Now()
	if p.app.output == "table" {
		p.line("TIME", "REASON", "DIRECTION", "PROTO", "FROM", "TO", "RULE")
	}
}

// visit shows one event and reports whether to go on.
func (p *eventPrinter) visit(e flow.Event) bool {
	if e.Type != "drop" && !p.options.verdicts {
		return true
	}
	if p.options.reason != "" && e.Reason != p.options.reason {
		return true
	}
	p.refresh()
	e.Name(p.names)
	e.Device = p.devs[int(e.Ifindex)]
	if pod := p.options.pod; pod != "" && e.SourcePod != pod && e.DestinationPod != pod {
		return true
	}
	if p.app.output == "json" {
		p.err = json.NewEncoder(p.app.out).Encode(e)
	} else {
		p.print(e)
	}
	p.shown++
	return p.err == nil && p.shown != p.options.count
}

// refresh reads the names again when they are older than a second: pods and rules come while one watches.
func (p *eventPrinter) refresh() {
	if p.devs != nil && time.Since(p.loaded) < time.Second {
		return
	}
	p.loaded = time.Now()
	if names, err := flow.LoadNames(p.app.node.Run); err == nil {
		p.names = names
	}
	if devs, err := listDevices(); err == nil {
		p.devs = devs
	}
}

func (p *eventPrinter) print(e flow.Event) {
	if p.options.numeric {
		e.SourcePod, e.DestinationPod = "", ""
	}
	reason := e.Reason
	if e.Type != "drop" && reason == "none" {
		reason = "allowed"
	}
	p.line(e.Time.Local().Format("15:04:05.000"), reason, e.Direction, e.Protocol,
		end(e.Protocol, e.Source, e.SourcePod), end(e.Protocol, e.Destination, e.DestinationPod), named(e.Rule, e.RuleID))
}

func (p *eventPrinter) line(cells ...string) {
	for i := range cells {
		cells[i] = pad(cells[i], eventWidths[i], false)
	}
	_, p.err = fmt.Fprintln(p.app.out, strings.TrimRight(strings.Join(cells, "  "), " "))
}
