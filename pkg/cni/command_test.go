// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
)

// What a call lacks is said before anything is done, with the specification's codes.
func TestCommandRefuses(t *testing.T) {
	const all = "CNI_CONTAINERID=c CNI_NETNS=/n CNI_IFNAME=eth0 CNI_PATH=/p"
	for _, tc := range []struct {
		name, env, conf string
		code            uint
		words           string
	}{
		{"unknown command", "CNI_COMMAND=EAT " + all, `{}`, types.ErrInvalidEnvironmentVariables, "EAT"},
		{"ADD without variables", "CNI_COMMAND=ADD CNI_PATH=/p", `{}`, types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"},
		{"DEL without variables", "CNI_COMMAND=DEL", `{}`, types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID, CNI_IFNAME, CNI_PATH"},
		{"GC without CNI_PATH", "CNI_COMMAND=GC", `{}`, types.ErrInvalidEnvironmentVariables, "CNI_PATH"},
		{"no JSON", "CNI_COMMAND=ADD " + all, `{`, types.ErrDecodingFailure, "JSON"},
		{"no name", "CNI_COMMAND=ADD " + all, `{"cniVersion":"1.0.0"}`, types.ErrInvalidNetworkConfig, "no name"},
		{"bad name", "CNI_COMMAND=ADD " + all, `{"cniVersion":"1.0.0","name":"../x"}`, types.ErrInvalidNetworkConfig, "../x"},
		{"no version", "CNI_COMMAND=ADD " + all, `{"name":"n"}`, types.ErrIncompatibleCNIVersion, "1.1.0"},
		{"version of the future", "CNI_COMMAND=DEL " + all, `{"cniVersion":"9.0.0","name":"n"}`, types.ErrIncompatibleCNIVersion, "9.0.0"},
		{"CHECK before it came", "CNI_COMMAND=CHECK " + all, `{"cniVersion":"0.3.1","name":"n"}`, types.ErrIncompatibleCNIVersion, "0.4.0"},
		{"GC before it came", "CNI_COMMAND=GC " + all, `{"cniVersion":"1.0.0","name":"n"}`, types.ErrIncompatibleCNIVersion, "1.1.0"},
		{"STATUS before it came", "CNI_COMMAND=STATUS " + all, `{"cniVersion":"1.0.0","name":"n"}`, types.ErrIncompatibleCNIVersion, "1.1.0"},
		{"container ID that is a path", "CNI_COMMAND=ADD CNI_CONTAINERID=../c CNI_NETNS=/n CNI_IFNAME=eth0 CNI_PATH=/p",
			`{"cniVersion":"1.0.0","name":"n","runDir":"/nonexistent","ipam":{"type":"x"}}`, types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			err := New(&out).command(context.Background(), environment(tc.env), strings.NewReader(tc.conf))
			var e *types.Error
			if !errors.As(err, &e) || e.Code != tc.code || !strings.Contains(e.Msg, tc.words) {
				t.Errorf("command() = %v, want code %d and %q", err, tc.code, tc.words)
			}
		})
	}
}

func environment(s string) func(string) string {
	values := map[string]string{}
	for _, pair := range strings.Fields(s) {
		key, value, _ := strings.Cut(pair, "=")
		values[key] = value
	}
	return func(key string) string { return values[key] }
}

func TestCommandVersion(t *testing.T) {
	var out bytes.Buffer
	if err := New(&out).command(context.Background(), environment("CNI_COMMAND=VERSION"), strings.NewReader("")); err != nil {
		t.Fatal(err)
	}
	var got struct {
		CNIVersion string   `json:"cniVersion"`
		Supported  []string `json:"supportedVersions"`
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.CNIVersion != "1.1.0" || len(got.Supported) != len(versions) {
		t.Errorf("VERSION printed %s (%v), want 1.1.0 and %v", out.Bytes(), err, versions)
	}
}
