// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// buildProgram builds one of this directory's programs, static, to where the nodes see it, and returns its path there.
func buildProgram(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(cluster.Dir, "bin", name)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", path, "./"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", name, err, out)
	}
	return path
}

// counter counts the packets that come into a place, whoever takes them there.
type counter struct{ p place }

// count begins to count TCP and UDP packets to a port, where no policy has a say any more: in the pod's own stack, before routing.
func count(t *testing.T, p place, port uint16) counter {
	t.Helper()
	c := counter{p}
	rules := fmt.Sprintf("table inet e2e {\n chain in {\n type filter hook prerouting priority raw;\n meta l4proto { tcp, udp } th dport %d counter\n }\n}\n", port)
	if _, err := c.nft(rules, "-f", "-"); err != nil {
		t.Fatal(err)
	}
	return c
}

var packets = regexp.MustCompile(`counter packets (\d+)`)

// value returns how many packets have come.
func (c counter) value(t *testing.T) int {
	t.Helper()
	out, err := c.nft("", "list", "table", "inet", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	m := packets.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no counter in %q", out)
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// nft runs nft in the place.
func (c counter) nft(stdin string, args ...string) (string, error) {
	path, err := c.p.netns()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + path, "--", "nft"}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%v: %w: %s", cmd, err, out)
	}
	return string(out), err
}

// durations are measured times.
type durations []time.Duration

// String returns how many there are, and their median, 99th percentile and maximum.
func (d durations) String() string {
	if len(d) == 0 {
		return "none"
	}
	return fmt.Sprintf("n %d, p50 %v, p99 %v, most %v", len(d), d.quantile(0.5), d.quantile(0.99), d.quantile(1))
}

// quantile returns the smallest time that at least this part of all does not exceed.
func (d durations) quantile(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(d))
	i := int(float64(len(sorted))*q+0.999999) - 1
	return sorted[min(max(i, 0), len(sorted)-1)].Round(10 * time.Microsecond)
}
