// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Two plugins that log what they are asked.
func writeCNI(t *testing.T) (conflist, bin, log string) {
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	for name, result := range map[string]string{"first": `{"ips":[]}`, "second": `{"ips":[],"dns":{}}`} {
		script := "#!/bin/sh\necho \"" + name + " $CNI_COMMAND $CNI_CONTAINERID $(cat)\" >>" + log + "\n[ $CNI_COMMAND = ADD ] && echo '" + result + "'\nexit 0\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	conflist = filepath.Join(dir, "10-other.conflist")
	text := `{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"first","mtu":1500},{"type":"second"}]}`
	if err := os.WriteFile(conflist, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return conflist, dir, log
}

func TestChain(t *testing.T) {
	conflist, bin, log := writeCNI(t)
	var flag cnis
	if err := flag.Set("other=" + conflist + "," + bin); err != nil {
		t.Fatal(err)
	}
	if len(flag) != 1 || flag[0].Name != "other" || flag.String() != "other" || !flag[0].oneNode {
		t.Fatalf("cnis = %+v", flag)
	}
	text, err := flag[0].conflist(&placeholders{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseChain(text, flag[0].Bin)
	if err != nil {
		t.Fatal(err)
	}
	took, out, err := c.run(context.Background(), "ADD", "pod", "/none")
	if err != nil || strings.TrimSpace(string(out)) != `{"ips":[],"dns":{}}` || took.wall <= 0 {
		t.Fatalf("ADD: %v, %q, %v", took, out, err)
	}
	if _, _, err := c.run(context.Background(), "DEL", "pod", "/none"); err != nil {
		t.Fatal(err)
	}
	asked, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	want := `first ADD pod {"cniVersion":"1.0.0","mtu":1500,"name":"net","type":"first"}
second ADD pod {"cniVersion":"1.0.0","name":"net","prevResult":{"ips":[]},"type":"second"}
second DEL pod {"cniVersion":"1.0.0","name":"net","prevResult":{"ips":[],"dns":{}},"type":"second"}
first DEL pod {"cniVersion":"1.0.0","mtu":1500,"name":"net","prevResult":{"ips":[],"dns":{}},"type":"first"}
`
	if string(asked) != want {
		t.Errorf("the plugins were asked\n%swant\n%s", asked, want)
	}
}

func TestCNIFlagErrors(t *testing.T) {
	conflist, bin, _ := writeCNI(t)
	empty := filepath.Join(bin, "empty.conflist")
	if err := os.WriteFile(empty, []byte(`{"name":"net"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "other", "other=" + conflist, "=" + conflist + "," + bin, "other=/none," + bin, "other=" + empty + "," + bin} {
		var flag cnis
		if err := flag.Set(text); err == nil {
			t.Errorf("-cni %q: no error", text)
		}
	}
}
