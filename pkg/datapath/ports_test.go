// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParsePortRange(t *testing.T) {
	for _, tt := range []struct {
		text string
		want PortRange
		ok   bool
	}{
		{"30000-32767", PortRange{30000, 32767}, true},
		{"80", PortRange{80, 80}, true},
		{"1-65535", PortRange{1, 65535}, true},
		{"0-5", PortRange{0, 5}, false},
		{"5-4", PortRange{}, false},
		{"1-65536", PortRange{}, false},
		{"1-", PortRange{}, false},
		{"", PortRange{}, false},
		{"a-b", PortRange{}, false},
	} {
		got, err := ParsePortRange(tt.text)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("ParsePortRange(%q) = %v, %v, want %v, accepted: %v", tt.text, got, err, tt.want, tt.ok)
		}
	}
}

func TestParseRanges(t *testing.T) {
	for _, tt := range []struct {
		text string
		want []PortRange
		ok   bool
	}{
		{"", nil, true},
		{"0-5,32000-32100,65535", []PortRange{{0, 5}, {32000, 32100}, {65535, 65535}}, true},
		{"80,x", nil, false},
		{"5-1", nil, false},
		{"70000", nil, false},
	} {
		got, err := parseRanges(tt.text)
		if diff := cmp.Diff(tt.want, got); diff != "" || (err == nil) != tt.ok {
			t.Errorf("parseRanges(%q) = %v, %v, want %v, accepted: %v", tt.text, got, err, tt.want, tt.ok)
		}
	}
}

// NodePorts join what is reserved already; the first value is remembered, and a second call writes nothing.
func TestReservePorts(t *testing.T) {
	// Longer than what a plain read of a file gets of this setting.
	var many []string
	for port := 1001; port < 3000; port += 2 {
		many = append(many, fmt.Sprint(port))
	}
	long := strings.Join(many, ",")
	for _, tt := range []struct {
		name, before, want string
		remembered         bool
	}{
		{"nothing reserved", "", "30000-32767", true},
		{"others", "0-5,8080,40000-40010", "0-5,8080,30000-32767,40000-40010", true},
		{"neighbours and overlaps", "29999,31000,32760-33000", "29999-33000", true},
		{"reserved already", "20000-40000", "20000-40000", false},
		{"many", long, long + ",30000-32767", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ns, cfg := place(t)
			must(t, os.MkdirAll(cfg.Run, 0o755))
			inNS(t, ns, func() error { return os.WriteFile(sysctlReserved, []byte(tt.before+"\n"), 0) })
			for range 2 {
				inNS(t, ns, func() error { return ReservePorts(context.Background(), cfg, PortRange{30000, 32767}) })
			}
			inNS(t, ns, func() error {
				got, err := readReserved()
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("reserved ports (-want +got):\n%s", diff)
				}
				return err
			})
			if !tt.remembered {
				if _, err := os.Stat(cfg.Run + "/sysctls.json"); err == nil {
					t.Error("sysctls.json is there, want nothing remembered where nothing was changed")
				}
				return
			}
			if diff := cmp.Diff(map[string]string{sysctlReserved: tt.before}, recorded(t, cfg, "sysctls.json")); diff != "" {
				t.Errorf("sysctls.json (-want +got):\n%s", diff)
			}
		})
	}
}

// The hostPorts of now are reserved, those of before are not, and everybody else's ports are left alone.
func TestReserveHostPorts(t *testing.T) {
	t.Parallel()
	ns, cfg := place(t)
	must(t, os.MkdirAll(cfg.Run, 0o755))
	reserved := func(want string) {
		t.Helper()
		inNS(t, ns, func() error {
			got, err := readReserved()
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("reserved ports (-want +got):\n%s", diff)
			}
			return err
		})
	}
	set := func(ports ...uint16) {
		t.Helper()
		var ranges []PortRange
		for _, p := range ports {
			ranges = append(ranges, PortRange{p, p})
		}
		inNS(t, ns, func() error { return ReserveHostPorts(context.Background(), cfg, ranges) })
	}
	inNS(t, ns, func() error { return os.WriteFile(sysctlReserved, []byte("53,8080\n"), 0) })
	set()
	reserved("53,8080")
	if _, err := os.Stat(cfg.Run + "/sysctls.json"); err == nil {
		t.Error("sysctls.json is there, want nothing remembered where nothing was changed")
	}
	set(8080, 8081, 40000)
	reserved("53,8080-8081,40000")
	set(8080, 8081, 40000)
	set(8081)
	reserved("53,8080-8081") // 8080 is somebody else's
	set(8081, 31000)
	inNS(t, ns, func() error { return ReservePorts(context.Background(), cfg, PortRange{30000, 32767}) })
	set(31001)
	reserved("53,8080,30000-32767")                                                      // 31000 is a NodePort's by now, and 31001 was one before
	inNS(t, ns, func() error { return os.WriteFile(sysctlReserved, []byte("53\n"), 0) }) // somebody sets it anew
	set(31001)
	reserved("53,31001")
	// Killed between note and sysctl, in either direction.
	must(t, os.WriteFile(cfg.Run+"/"+reservedFile, []byte(`[{"First":31001,"Last":31002}]`), 0o600))
	set(31001, 31002)
	reserved("53,31001-31002")
	must(t, os.WriteFile(cfg.Run+"/"+reservedFile, []byte(`[{"First":31001,"Last":31003}]`), 0o600))
	set()
	reserved("53")
	if _, err := os.Stat(cfg.Run + "/" + reservedFile); err == nil {
		t.Error("the list of reserved hostPorts is there without any")
	}
	if diff := cmp.Diff(map[string]string{sysctlReserved: "53,8080"}, recorded(t, cfg, "sysctls.json")); diff != "" {
		t.Errorf("sysctls.json (-want +got):\n%s", diff)
	}
}
