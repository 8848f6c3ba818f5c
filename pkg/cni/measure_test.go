// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
)

// TestMeasureAgainstPTP prints ADD's and DEL's cost as processes, ours and ptp with host-local in turns, so that both see the same machine.
// MARGAY_MEASURE is the number of rounds.
func TestMeasureAgainstPTP(t *testing.T) {
	rounds := 0
	if _, err := fmt.Sscan(os.Getenv("MARGAY_MEASURE"), &rounds); err != nil {
		t.Skip("set MARGAY_MEASURE to a number of rounds")
	}
	n := newRealNode(t, true)
	ptp, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "net", "type": "ptp", "ipam": n.hostLocal([]string{range4})})
	if err != nil {
		t.Fatal(err)
	}
	variants := []struct {
		name, binary string
		conf         []byte
		add, del     []time.Duration
	}{
		{name: "margay+margay-ipam IPv4", binary: "margay", conf: n.conf([]string{range4})},
		{name: "margay+margay-ipam dual", binary: "margay", conf: n.conf(familyRanges["dual stack"])},
		{name: "ptp+host-local IPv4", binary: "ptp", conf: ptp},
	}
	for i := range rounds {
		for v := range variants {
			pod := netnstest.New(t)
			id := fmt.Sprintf("m%d-%d", v, i)
			run := func(command string) time.Duration {
				cmd := exec.Command(filepath.Join(n.bin, variants[v].binary))
				cmd.Env = append(os.Environ(), "CNI_COMMAND="+command, "CNI_CONTAINERID="+id, "CNI_NETNS="+pod.Path(), "CNI_IFNAME=eth0", "CNI_PATH="+n.bin)
				cmd.Stdin = bytes.NewReader(variants[v].conf)
				var took time.Duration
				n.ns.Do(func() {
					start := time.Now()
					if out, err := cmd.CombinedOutput(); err != nil {
						t.Fatalf("%s: %v: %s", command, err, out)
					}
					took = time.Since(start)
				})
				return took
			}
			variants[v].add = append(variants[v].add, run("ADD"))
			variants[v].del = append(variants[v].del, run("DEL"))
			pod.Delete()
		}
	}
	for _, v := range variants {
		for what, d := range map[string][]time.Duration{"ADD": v.add, "DEL": v.del} {
			slices.Sort(d)
			t.Logf("%-26s %s p50 %8s p99 %8s", v.name, what, d[len(d)/2].Round(10*time.Microsecond), d[len(d)*99/100].Round(10*time.Microsecond))
		}
	}
}
