// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"
)

// table is text in columns, each as wide as its longest cell, two spaces apart. A title that starts with ">" makes its column
// right-aligned, for numbers.
type table struct {
	titles []string
	rows   [][]string
	indent string
}

func newTable(titles ...string) *table {
	return &table{titles: titles}
}

func (t *table) add(cells ...string) {
	t.rows = append(t.rows, cells)
}

// print writes the titles and the rows; nothing when there is no row.
func (t *table) print(w io.Writer) {
	if len(t.rows) == 0 {
		return
	}
	titles, right, width := make([]string, len(t.titles)), make([]bool, len(t.titles)), make([]int, len(t.titles))
	for i, title := range t.titles {
		titles[i], right[i] = strings.CutPrefix(title, ">")
		width[i] = utf8.RuneCountInString(titles[i])
		for _, row := range t.rows {
			width[i] = max(width[i], utf8.RuneCountInString(row[i]))
		}
	}
	for _, row := range append([][]string{titles}, t.rows...) {
		var line strings.Builder
		line.WriteString(t.indent)
		for i, cell := range row {
			if i > 0 {
				line.WriteString("  ")
			}
			line.WriteString(pad(cell, width[i], right[i]))
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}

// pad fills s with spaces to width.
func pad(s string, width int, right bool) string {
	fill := strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
	if right {
		return fill + s
	}
	return s + fill
}

// printJSON writes v as one indented document.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printer is the table form of what a command collected.
type printer interface {
	print(w io.Writer)
}

// show prints v in the format that was asked for.
func (a *app) show(v printer) error {
	if a.output == "json" {
		return printJSON(a.out, v)
	}
	v.print(a.out)
	return nil
}

// dash stands for "nothing" in a cell, so that columns stay readable.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// shorten joins the first few of many.
func shorten(list []string, most int) string {
	if len(list) > most {
		return fmt.Sprintf("%s, +%d", strings.Join(list[:most], ", "), len(list)-most)
	}
	return strings.Join(list, ", ")
}

// end names one end of a flow: pod and port, or the address. ICMP has no port: its identifier stands in the state.
func end(protocol string, ap netip.AddrPort, pod string) string {
	icmp := strings.HasPrefix(protocol, "ICMP")
	switch {
	case pod != "" && icmp:
		return pod
	case pod != "":
		return fmt.Sprintf("%s:%d", pod, ap.Port())
	case icmp:
		return ap.Addr().String()
	}
	return ap.String()
}

// span writes a duration with its two largest units: 3s, 2m10s, 1h5m, 3d4h.
func span(d time.Duration) string {
	s := int64(d / time.Second)
	units := []struct {
		seconds int64
		name    string
	}{{86400, "d"}, {3600, "h"}, {60, "m"}, {1, "s"}}
	for i, u := range units {
		if s < u.seconds {
			continue
		}
		text := fmt.Sprintf("%d%s", s/u.seconds, u.name)
		if i+1 < len(units) {
			if rest := s % u.seconds / units[i+1].seconds; rest > 0 {
				text += fmt.Sprintf("%d%s", rest, units[i+1].name)
			}
		}
		return text
	}
	return "0s"
}

// size writes a number of bytes with a binary unit.
func size(bytes uint64) string {
	if bytes < 1024 {
		return fmt.Sprintf("%d B", bytes)
	}
	value, unit := float64(bytes)/1024, 0
	for value >= 1024 && unit < 3 {
		value, unit = value/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGT"[unit])
}
