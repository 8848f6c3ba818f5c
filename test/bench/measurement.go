// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// measurement collects the rounds of one comparison: Margay's figure beside one reference's, or alone. A figure that is compared with
// several references is several measurements, see beside.
type measurement struct {
	ID        string // unique, the same in every run: results are compared with earlier ones by it
	Section   string
	Name      string
	Unit      string
	Reference string // what Margay is compared with; empty: nothing

	Target   float64 // for the ratio, Margay's figure by the reference's; 0 = none
	Absolute bool    // Target is for Margay's own figure instead
	Higher   bool    // higher figures are better

	// Portable is a figure that hardly depends on the machine, such as the size of a map: the regression check compares it as it is.
	Portable bool

	ours, theirs []float64 // by round
}

// add notes one round, in which both were measured one after the other.
func (m *measurement) add(margay, reference float64) {
	m.ours = append(m.ours, margay)
	m.theirs = append(m.theirs, reference)
}

// addAlone notes one round of a measurement without reference.
func (m *measurement) addAlone(margay float64) { m.ours = append(m.ours, margay) }

// beside returns a measurement of the same figure beside another reference, without a target and without rounds.
func (m *measurement) beside(reference string) *measurement {
	return &measurement{
		ID: m.ID + "~" + idOf(reference), Section: m.Section, Name: m.Name, Unit: m.Unit, Reference: reference, Higher: m.Higher,
	}
}

// result is what is reported of a measurement, and what the results' file holds.
type result struct {
	ID        string     `json:"id"`
	Section   string     `json:"section"`
	Name      string     `json:"name"`
	Unit      string     `json:"unit"`
	Margay    float64    `json:"margay"`         // median of the rounds
	Value     *float64   `json:"reference"`      // median of the rounds; null: not compared
	Reference string     `json:"reference_name"` // empty: not compared
	Ratio     *float64   `json:"ratio"`          // median over the rounds of Margay's figure by the reference's
	Target    *float64   `json:"target"`
	TargetOf  string     `json:"target_of,omitempty"` // what the target is for: ofRatio or ofValue
	Higher    bool       `json:"higher_is_better,omitempty"`
	OK        bool       `json:"ok"` // true also without a target
	Rounds    int        `json:"rounds"`
	Range     [2]float64 `json:"margay_range"` // smallest and largest round
	Portable  bool       `json:"portable,omitempty"`

	ReferenceRange *[2]float64 `json:"reference_range,omitempty"`
	// Quartiles of what the regression check compares: of the rounds' ratios or, where the figure is portable, of Margay's figures.
	Quartiles [2]float64 `json:"quartiles"`

	// Interval is where the median of more such rounds would be, with a confidence of 95 %: of what the target is for or, without one, of the
	// ratio. Null: too few rounds to say.
	Interval *[2]float64 `json:"interval"`
	// WithinNoise says that the target lies in it: more rounds may turn OK into its opposite.
	WithinNoise bool `json:"within_noise,omitempty"`
}

const (
	ofRatio = "ratio"
	ofValue = "margay"
)

// result computes what is reported. A measurement without rounds has none, which is an error of the section.
func (m *measurement) result() (result, error) {
	r := result{
		ID: m.ID, Section: m.Section, Name: m.Name, Unit: m.Unit, Reference: m.Reference, Higher: m.Higher, Portable: m.Portable,
		Rounds: len(m.ours), Margay: rounded(median(m.ours)), OK: true,
	}
	if len(m.ours) == 0 || (m.Reference != "") != (len(m.theirs) > 0) {
		return r, fmt.Errorf("%s: %d rounds of Margay, %d of its reference %q", m.ID, len(m.ours), len(m.theirs), m.Reference)
	}
	r.Range = extent(m.ours)
	if m.Reference != "" {
		value, e := rounded(median(m.theirs)), extent(m.theirs)
		r.Value, r.ReferenceRange = &value, &e
	}
	ratios := m.ratios()
	if ratio := median(ratios); !math.IsNaN(ratio) && !math.IsInf(ratio, 0) {
		ratio = math.Round(1000*ratio) / 1000
		r.Ratio = &ratio
	}
	compared := m.ours
	if !m.Portable && r.Ratio != nil {
		compared = ratios
	}
	r.Quartiles = [2]float64{rounded(percentile(compared, 25)), rounded(percentile(compared, 75))}
	for _, v := range []float64{r.Margay, r.Range[0], r.Range[1], r.Quartiles[0], r.Quartiles[1]} {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return r, fmt.Errorf("%s: a round is no number: %v, %v", m.ID, m.ours, m.theirs)
		}
	}
	of := ratios
	if m.Absolute || r.Ratio == nil {
		of = m.ours
	}
	if i, ok := medianInterval(of); ok {
		r.Interval = &[2]float64{rounded(i[0]), rounded(i[1])}
	}
	return r, r.judge(m)
}

// judge holds the result against the measurement's target.
func (r *result) judge(m *measurement) error {
	if m.Target == 0 {
		return nil
	}
	target := m.Target
	r.Target, r.TargetOf = &target, ofRatio
	got := r.Ratio
	if m.Absolute {
		r.TargetOf, got = ofValue, &r.Margay
	}
	if got == nil {
		return fmt.Errorf("%s: a target for the ratio, and no ratio", m.ID)
	}
	r.OK = r.within(*got)
	r.WithinNoise = r.Interval != nil && r.within(r.Interval[0]) != r.within(r.Interval[1])
	return nil
}

// within says whether a figure reaches the target.
func (r *result) within(v float64) bool {
	return (r.Higher && v >= *r.Target) || (!r.Higher && v <= *r.Target)
}

// ratios returns Margay's figure by the reference's, round by round: what disturbs the machine for longer than a round disturbs both, and
// the ratio not. Without a reference there are none; where the sides have different numbers of rounds there is one, of the medians.
func (m *measurement) ratios() []float64 {
	if len(m.ours) != len(m.theirs) {
		if len(m.theirs) == 0 {
			return nil
		}
		return []float64{median(m.ours) / median(m.theirs)}
	}
	var ratios []float64
	for i, v := range m.ours {
		ratios = append(ratios, v/m.theirs[i])
	}
	return ratios
}

func extent(values []float64) [2]float64 {
	return [2]float64{rounded(slices.Min(values)), rounded(slices.Max(values))}
}

// rounded keeps four significant digits: more would be noise.
func rounded(v float64) float64 {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) {
		return v
	}
	scale := math.Pow(10, 3-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v < 0.1:
		return fmt.Sprintf("%.4f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

func span(r [2]float64) string {
	return number(r[0]) + "–" + number(r[1])
}

// target returns the target in words: a ratio as a number, one for Margay's own figure with its unit.
func (r *result) target() string {
	if r.Target == nil {
		return ""
	}
	sign := "≤ "
	if r.Higher {
		sign = "≥ "
	}
	if r.TargetOf == ofValue {
		return sign + strings.TrimSuffix(strings.TrimSuffix(number(*r.Target), ".00"), ".0") + " " + r.Unit
	}
	return sign + fmt.Sprintf("%.2f", *r.Target)
}

// ratio returns the ratio with two digits or, where these would look as if a missed target were reached, with three.
func (r *result) ratio() string {
	short := fmt.Sprintf("%.2f", *r.Ratio)
	if r.TargetOf == ofRatio && !r.OK && short == fmt.Sprintf("%.2f", *r.Target) {
		return fmt.Sprintf("%.3f", *r.Ratio)
	}
	return short
}

// verdict says whether the target is reached and, where that could be chance, so.
func (r *result) verdict() string {
	if r.Target == nil {
		return ""
	}
	word := "no"
	if r.OK {
		word = "yes"
	}
	return word + r.doubt()
}

// doubt qualifies a verdict; empty: none is due.
func (r *result) doubt() string {
	switch {
	case r.WithinNoise:
		return ", within noise"
	case r.Interval == nil && r.Rounds == 1:
		return ", 1 round"
	case r.Interval == nil:
		return fmt.Sprintf(", %d rounds", r.Rounds)
	default:
		return ""
	}
}

// interval returns the interval in words, with the unit where it is not the ratio's. Three digits: a target is often nearer than the second.
func (r *result) interval() string {
	switch {
	case r.Interval == nil:
		return ""
	case r.TargetOf == ofValue || r.Ratio == nil:
		return span(*r.Interval) + " " + r.Unit
	default:
		return fmt.Sprintf("%.3f–%.3f", r.Interval[0], r.Interval[1])
	}
}

var columns = []string{"", "unit", "margay", "range", "reference", "range", "", "ratio", "interval", "target", "ok"}

func (r *result) row() []string {
	values := func(v float64, rounds [2]float64) (string, string) {
		if r.Rounds == 1 {
			return number(v), ""
		}
		return number(v), span(rounds)
	}
	ours, ourRange := values(r.Margay, r.Range)
	theirs, theirRange, ratio := "", "", ""
	if r.Value != nil {
		theirs, theirRange = values(*r.Value, *r.ReferenceRange)
	}
	if r.Ratio != nil {
		ratio = r.ratio()
	}
	return []string{r.Name, r.Unit, ours, ourRange, theirs, theirRange, r.Reference, ratio, r.interval(), r.target(), r.verdict()}
}
