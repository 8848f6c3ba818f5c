// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
)

// baseline is an earlier run's results, which a run is compared with.
type baseline struct {
	name    string // what the results are, for the report; empty: there are none
	results []result
}

// readBaseline returns the committed results: those of the checkout's last commit, because a run may have written others over them since.
// Where there is no version control they are those on disk, and without any there is nothing to compare with.
func readBaseline(ctx context.Context) (baseline, error) {
	b := baseline{name: "the committed results"}
	text, err := exec.CommandContext(ctx, "git", "show", "HEAD:"+latestRun).Output()
	if err != nil {
		b.name = latestRun
		if text, err = os.ReadFile(latestRun); os.IsNotExist(err) {
			return baseline{}, nil
		} else if err != nil {
			return b, err
		}
	}
	if err := json.Unmarshal(text, &b.results); err != nil {
		return b, fmt.Errorf("decode %s: %w", b.name, err)
	}
	return b, nil
}

// regression is a figure that is worse than it was, by more than its rounds' spread explains.
type regression struct {
	result
	what    string // what is compared: ratio, or the unit of a portable figure
	was, is float64
	allowed float64 // share of was
}

// What two runs of the same programs may differ by: the medians' own uncertainty comes on top, see allowance.
const (
	betweenRuns = 0.05
	// A figure of few rounds says nothing of its spread, nor does one of a file without quartiles.
	unknownSpread = 0.25
	fewRounds     = 5
)

// figure returns what is compared of a result between runs, ok false if nothing: seconds depend on the machine, ratios much less.
func (r *result) figure() (what string, value float64, ok bool) {
	switch {
	case r.Portable:
		return r.Unit, r.Margay, true
	case r.Ratio != nil:
		return ofRatio, *r.Ratio, true
	default:
		return "", 0, false
	}
}

// allowance is the share by which a figure may be worse than before without a warning. A median of n rounds varies by about half the
// distance between the quartiles by the root of n; the whole mean distance of both runs is more than twice that for the ten rounds and more
// that are quoted, and so leaves a false warning to about one figure in a hundred.
func allowance(was, is *result) float64 {
	share := func(r *result) float64 {
		_, value, _ := r.figure()
		if value == 0 {
			return 0
		}
		return (r.Quartiles[1] - r.Quartiles[0]) / value
	}
	allowed := betweenRuns + (share(was)+share(is))/2
	if was.Rounds < fewRounds || is.Rounds < fewRounds || was.Quartiles == [2]float64{} {
		allowed = max(allowed, unknownSpread)
	}
	return allowed
}

// regressions returns which results are worse than the baseline's of the same id, and how many could be compared.
func (b baseline) regressions(results []result) (worse []regression, compared int) {
	before := map[string]*result{}
	for i := range b.results {
		before[b.results[i].ID] = &b.results[i]
	}
	for i := range results {
		is := &results[i]
		was := before[is.ID]
		if was == nil || was.Reference != is.Reference || was.Unit != is.Unit || was.Portable != is.Portable || was.Higher != is.Higher {
			continue
		}
		what, now, ok := is.figure()
		_, then, had := was.figure()
		if !ok || !had {
			continue
		}
		compared++
		allowed := allowance(was, is)
		if (is.Higher && now < then*(1-allowed)) || (!is.Higher && now > then*(1+allowed)) {
			worse = append(worse, regression{result: *is, what: what, was: then, is: now, allowed: allowed})
		}
	}
	return worse, compared
}

func (r *regression) change() string { return fmt.Sprintf("%+.0f %%", 100*(r.is/r.was-1)) }
func (r *regression) allows() string { return fmt.Sprintf("%.0f %%", 100*r.allowed) }

func regressionTable(regressions []regression) table {
	t := table{title: "Worse than the committed results", head: []string{"", "reference", "compared", "was", "is", "change", "allowed"}}
	for _, r := range regressions {
		t.rows = append(t.rows, []string{
			r.Section + ": " + r.Name, r.Reference, r.what, fmt.Sprintf("%.3g", r.was), fmt.Sprintf("%.3g", r.is), r.change(), r.allows(),
		})
	}
	return t
}

// warn says what is worse than before.
func warn(log *slog.Logger, regressions []regression) {
	for _, r := range regressions {
		log.Warn("worse than the committed results", slog.String("id", r.ID), slog.String("reference", r.Reference),
			slog.String("compared", r.what), slog.Float64("was", r.was), slog.Float64("is", r.is),
			slog.String("change", r.change()), slog.String("allowed", r.allows()))
	}
}
