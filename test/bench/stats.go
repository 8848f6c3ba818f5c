// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"
	"slices"
	"strings"
)

// median returns the middle value, between the two middle ones of an even number; NaN of nothing.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// percentile returns the smallest value that p percent of the values do not exceed; NaN of nothing.
func percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(values))
	return s[max(0, int(math.Ceil(p/100*float64(len(s))))-1)]
}

// middleMean returns the mean of the values between the quartiles: finer than a median where values are whole nanoseconds, and as
// indifferent to what interrupted some of them.
func middleMean(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	s = s[len(s)/4 : len(s)-len(s)/4]
	sum := 0.0
	for _, v := range s {
		sum += v
	}
	return sum / float64(len(s))
}

// medianInterval returns the two values between which the median lies of what the values are a sample of, with a confidence of at least 95 %,
// whatever their distribution: so many from each end that fewer coins of as many show heads only once in forty times. Fewer than six values
// say nothing.
func medianInterval(values []float64) (interval [2]float64, ok bool) {
	s := slices.Sorted(slices.Values(values))
	n := len(s)
	exactly := math.Pow(0.5, float64(n)) // the probability of so many heads
	outside := 0                         // values at each end
	for below := exactly; below <= 0.025; below += exactly {
		outside++
		exactly *= float64(n-outside+1) / float64(outside)
	}
	if outside == 0 {
		return interval, false
	}
	return [2]float64{s[outside-1], s[n-outside]}, true
}

// idOf returns a name as a part of a measurement's id: "dual stack" → "dual-stack".
func idOf(name string) string {
	return strings.ReplaceAll(strings.ToLower(name), " ", "-")
}
