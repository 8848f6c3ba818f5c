// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

var plotTo = flag.String("plot", "", "write TestPlot's plot to this `file`, to look at")

func TestPlot(t *testing.T) {
	first := measured(measurement{ID: "a", Section: "<Traffic> & more", Name: "TCP_RR, IPv4", Unit: "µs", Target: 1.05, Reference: "bare veth pair"},
		[]float64{14, 15, 16}, []float64{12, 12, 12})
	second := first.beside("ptp + kube-proxy nftables")
	second.ours, second.theirs = first.ours, []float64{20, 20, 20}
	alone := measured(measurement{ID: "b", Section: first.Section, Name: "RSS", Unit: "MiB", Target: 64, Absolute: true}, []float64{50}, nil)
	results := []result{mustResult(t, first), mustResult(t, second), mustResult(t, alone)}
	for i := range 5 { // into two columns
		results = append(results, mustResult(t, measured(measurement{
			ID: fmt.Sprint(i), Section: first.Section, Name: fmt.Sprintf("TCP_CRR, IPv6, %d connections", i), Unit: "1000/s", Target: 0.95, Higher: true,
		}, []float64{9, 10, 11}, []float64{10, 10, 10})))
	}
	p := newPlot(results)
	if len(p.Figures) != 7 {
		t.Fatalf("%d figures, want 7: references of one figure share it", len(p.Figures))
	}
	f := p.Figures[0]
	if len(f.Bars) != 3 || len(f.Marks) != 1 || !f.Missed {
		t.Fatalf("first figure: %d bars, %d marks, missed %v, want 3, 1, true", len(f.Bars), len(f.Marks), f.Missed)
	}
	long := f.Bars[2].W // the largest value
	for i, want := range []float64{15.0 / 20, 12.0 / 20, 1} {
		if got := f.Bars[i].W / long; got < want-0.01 || got > want+0.01 {
			t.Errorf("bar of %s: %.2f of the longest, want %.2f", f.Bars[i].Label, got, want)
		}
	}
	if got, want := (f.Marks[0].X-f.Bars[0].X)/long, 1.05*12/20; got < want-0.01 || got > want+0.01 {
		t.Errorf("target at %.2f of the longest bar, want %.2f", got, want)
	}
	if !f.Bars[0].Range || f.Bars[1].Range {
		t.Errorf("ranges drawn: %v, %v, want true, false", f.Bars[0].Range, f.Bars[1].Range)
	}
	if rss := p.Figures[1]; rss.Missed || (rss.Marks[0].X-rss.Bars[0].X) <= rss.Bars[0].W {
		t.Errorf("RSS of 50 MiB with a target of 64: %+v", rss)
	}
	if p.Figures[0].X == p.Figures[6].X {
		t.Error("seven figures stand in one column")
	}
	var b bytes.Buffer
	if err := p.write(&b); err != nil {
		t.Fatal(err)
	}
	if *plotTo != "" {
		if err := os.WriteFile(*plotTo, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	bars, text := 0, ""
	for decoder := xml.NewDecoder(&b); ; {
		token, err := decoder.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			if token.Name.Local == "rect" {
				bars++
			}
		case xml.CharData:
			text += string(token)
		}
	}
	if bars != 1+3+1+10 {
		t.Errorf("%d rectangles, want the paper and 14 bars", bars)
	}
	for _, want := range []string{"<Traffic> & more", "1.25, target ≤ 1.05, missed", "target ≤ 64 MiB", "15.0 µs", "ptp + kube-proxy nftables"} {
		if !strings.Contains(text, want) {
			t.Errorf("the plot does not say %q", want)
		}
	}
}

func TestPlotName(t *testing.T) {
	if got := plotName("CNI commands, as processes"); got != "cni-commands-as-processes.svg" {
		t.Errorf("plotName() = %q", got)
	}
}
