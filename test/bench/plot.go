// SPDX-License-Identifier: Apache-2.0

package main

import (
	_ "embed"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"unicode/utf8"
)

// A plot has a group of bars for every figure of a section: Margay, and under it what it is compared with. Every group has a scale of its
// own that begins at 0, because a section's figures have different units.

//go:embed plot.svg.tmpl
var plotText string

var plotTemplate = template.Must(template.New("plot").Funcs(template.FuncMap{"text": escapeXML}).Parse(plotText))

func escapeXML(text string) (string, error) {
	var b strings.Builder
	err := xml.EscapeText(&b, []byte(text))
	return b.String(), err
}

// Sizes in the plot's own units, pixels where it is not scaled.
const (
	plotWidth    = 1000
	plotMargin   = 16
	plotTop      = 58 // above the first figure
	columnGap    = 24
	oneColumn    = 4   // figures that stand in one column; more stand in two
	letterWidth  = 6.6 // of labels and values, about
	longestText  = 200
	barHeight    = 13
	barPitch     = 16
	figureHead   = 18 // height of a figure's name
	figureGap    = 12 // below the last bar
	capHeight    = 6  // of the ends of a range
	otherClasses = 4  // colours of references in the template
)

type plot struct {
	Title, Legend string
	Width, Height float64
	Frame         struct{ W, H float64 }
	Figures       []plotFigure
}

type plotFigure struct {
	X, Y         float64 // of its name's baseline
	Name, Target string
	Missed       bool
	Bars         []plotBar
	Marks        []plotMark
	height       float64
}

type plotBar struct {
	Label, Value, Class string
	LabelX, ValueX      float64
	X, Y, W, H, TextY   float64
	Range               bool // whether the rounds differ
	Low, HighX, MidY    float64
	CapTop, Cap         float64

	value float64
	span  [2]float64
}

// plotMark is a target, on Margay's bar.
type plotMark struct {
	X, Y, H float64
	Missed  bool

	at float64
}

// plotName returns the file name of a section's plot.
func plotName(section string) string { return fileName(section) + ".svg" }

// fileName returns a name as one of a file: lower case, digits, and dashes for everything else.
func fileName(name string) string {
	words := strings.FieldsFunc(strings.ToLower(name), func(r rune) bool { return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789", r) })
	return strings.Join(words, "-")
}

// newPlot lays out a section's results.
func newPlot(results []result) *plot {
	p := &plot{Title: results[0].Section, Width: plotWidth}
	p.Legend = "Medians of the rounds, thin lines from the smallest round to the largest. Every figure has its own scale from 0. The upright mark is the target."
	index := map[string]int{}
	refs := map[string]int{} // a reference has one colour in the whole plot
	for i := range results {
		r := &results[i]
		at, known := index[r.Name+"\x00"+r.Unit]
		if !known {
			at = len(p.Figures)
			index[r.Name+"\x00"+r.Unit] = at
			p.Figures = append(p.Figures, plotFigure{Name: r.Name})
			p.Figures[at].bar("Margay", "margay", r.Unit, r.Margay, r.Range)
		}
		p.Figures[at].compare(r, refs)
	}
	p.place()
	return p
}

// compare adds a result's reference and target to its figure.
func (f *plotFigure) compare(r *result, refs map[string]int) {
	if r.Value != nil {
		if _, known := refs[r.Reference]; !known {
			refs[r.Reference] = len(refs) % otherClasses
		}
		f.bar(r.Reference, fmt.Sprintf("other%d", refs[r.Reference]), r.Unit, *r.Value, *r.ReferenceRange)
	}
	if r.Target == nil {
		return
	}
	at, words := *r.Target, "target "+r.target()
	if r.TargetOf == ofRatio {
		// Where Margay's figure would be with that ratio: the ratio is of the rounds, not of the two medians that are drawn.
		at *= r.Margay / *r.Ratio
		words = r.ratio() + ", " + words
	}
	if !r.OK {
		words += ", missed"
		f.Missed = true
	}
	f.Target = strings.TrimPrefix(f.Target+"; "+words, "; ")
	f.Marks = append(f.Marks, plotMark{at: at, Missed: !r.OK})
}

func (f *plotFigure) bar(label, class, unit string, value float64, span [2]float64) {
	f.Bars = append(f.Bars, plotBar{Label: label, Class: class, Value: number(value) + " " + unit, value: value, span: span, Range: span[0] < span[1]})
}

// place gives everything its coordinates, in one column or two.
func (p *plot) place() {
	columns := 1
	if len(p.Figures) > oneColumn {
		columns = 2
	}
	label, value := 0.0, 0.0
	for _, f := range p.Figures {
		for _, b := range f.Bars {
			label, value = max(label, textWidth(b.Label)), max(value, textWidth(b.Value))
		}
	}
	width := (plotWidth - 2*plotMargin - float64(columns-1)*columnGap) / float64(columns)
	total := 0.0
	for i := range p.Figures {
		p.Figures[i].height = figureHead + barPitch*float64(len(p.Figures[i].Bars)) + figureGap
		total += p.Figures[i].height
	}
	x, y, bottom := float64(plotMargin), float64(plotTop), 0.0
	for i := range p.Figures {
		f := &p.Figures[i]
		if columns == 2 && x == plotMargin && y-plotTop >= total/2 {
			x, y = x+width+columnGap, plotTop
		}
		f.place(x, y, width, label, value)
		y += f.height
		bottom = max(bottom, y)
	}
	p.Height = bottom + plotMargin - figureGap
	p.Frame.W, p.Frame.H = p.Width-1, p.Height-1
}

func (f *plotFigure) place(x, y, width, label, value float64) {
	left, long := tenth(x+label), tenth(width-label-value)
	largest := 0.0
	for _, b := range f.Bars {
		largest = max(largest, b.value, b.span[1])
	}
	for _, m := range f.Marks {
		largest = max(largest, m.at)
	}
	at := func(v float64) float64 {
		if largest == 0 {
			return left
		}
		return tenth(left + long*v/largest)
	}
	f.X, f.Y = x, y+12
	for i := range f.Bars {
		b := &f.Bars[i]
		b.X, b.Y, b.W, b.H = left, y+figureHead+barPitch*float64(i), tenth(at(b.value)-left), barHeight
		b.TextY, b.MidY = b.Y+barHeight-3, b.Y+barHeight/2.0
		b.LabelX, b.ValueX = left-6, left+long+8
		b.Low, b.HighX = at(b.span[0]), at(b.span[1])
		b.CapTop, b.Cap = b.MidY-capHeight/2.0, capHeight
	}
	for i := range f.Marks {
		m := &f.Marks[i]
		m.X, m.Y, m.H = at(m.at), f.Bars[0].Y-2, barHeight+4
	}
}

// textWidth returns the room that a label or a value takes, with its distance from the bar.
func textWidth(text string) float64 {
	return min(letterWidth*float64(utf8.RuneCountInString(text))+12, longestText)
}

func tenth(v float64) float64 { return math.Round(10*v) / 10 }

func (p *plot) write(w io.Writer) error { return plotTemplate.Execute(w, p) }

// writePlots makes the directory's plots those of the results: one for every section, and no others.
func writePlots(dir string, results []result) error {
	written := map[string]bool{}
	var errs []error
	for _, group := range bySection(results) {
		var b strings.Builder
		if err := newPlot(group).write(&b); err != nil {
			return fmt.Errorf("plot %s: %w", group[0].Section, err)
		}
		path := filepath.Join(dir, plotName(group[0].Section))
		written[path] = true
		errs = append(errs, replaceFile(path, []byte(b.String())))
	}
	all, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	for _, path := range all {
		if !written[path] {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(append(errs, err)...)
}
