// SPDX-License-Identifier: Apache-2.0

package main

import (
	_ "embed"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Names under which Kubernetes v1.37.2 asks for its test images (test/utils/image/manifest.go there), network-policy-api v0.3.0 for
// its server (conformance/base/manifests.yaml there), and containerd 2.4 for the sandbox. `make conformance` compares them with
// `e2e.test --list-images`.
const (
	registry     = "registry.k8s.io/"
	testRegistry = registry + "e2e-test-images/"
)

// path is how the shells of the images find their commands. It is the same that a Docker image has by default.
const path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

//go:embed pause/pause.c
var pauseSource []byte

// catalog collects the content of every image and returns the archives to write. Layers are built in the directory scratch, which must
// outlive the archives.
func catalog(from inputs, scratch string) ([]archive, error) {
	binary := func(name string) tree { return tree{name: {mode: 0o755, source: filepath.Join(from.binaries, name)}} }

	pauseTree, err := buildPause(scratch)
	if err != nil {
		return nil, err
	}
	toolsTree, err := tools(from)
	if err != nil {
		return nil, err
	}
	layers := map[string]layer{}
	for name, content := range map[string]tree{
		"pause": pauseTree, "tools": toolsTree, "coredns": binary("coredns"), "regression": binary("regression-issue-74839"),
	} {
		if layers[name], err = content.layer(filepath.Join(scratch, name+".tar")); err != nil {
			return nil, fmt.Errorf("layer %s: %w", name, err)
		}
	}

	// The layer of coredns comes first in both images that have it, so that a node unpacks it once. The test images differ only in what
	// they run when a pod names no command.
	withTools := []layer{layers["coredns"], layers["tools"]}
	return []archive{
		{"pause.tar", []image{
			{names: []string{registry + "pause:3.10.2"}, layers: []layer{layers["pause"]}, entrypoint: []string{"/pause"}, user: "65535:65535"},
		}},
		{"coredns.tar", []image{
			{names: []string{registry + "coredns/coredns:v1.15.0"}, layers: []layer{layers["coredns"]}, entrypoint: []string{"/coredns"}},
		}},
		{"agnhost.tar", []image{
			{names: tagged("agnhost", "2.66.1", "2.55", "2.45"), layers: withTools, entrypoint: []string{"/agnhost"}, command: []string{"pause"}},
			{names: append(tagged("busybox", "1.37.0-2", "1.36.1-1"), tagged("glibc-dns-testing", "2.1.1")...), layers: withTools, command: []string{"sh"}},
			{names: tagged("nginx", "1.27.0-2", "1.28.0-2"), layers: withTools, command: []string{"/agnhost", "test-webserver"}},
		}},
		{"regression-issue-74839.tar", []image{
			{names: tagged("regression-issue-74839", "1.5"), layers: []layer{layers["regression"]}, entrypoint: []string{"/regression-issue-74839"}},
		}},
	}, nil
}

// tagged returns the names of one image of the test registry.
func tagged(name string, tags ...string) []string {
	var names []string
	for _, tag := range tags {
		names = append(names, testRegistry+name+":"+tag)
	}
	return names
}

// buildPause compiles the program that holds a pod's namespaces. Statically linked C, because one runs in every pod.
func buildPause(scratch string) (tree, error) {
	source, built := filepath.Join(scratch, "pause.c"), filepath.Join(scratch, "pause")
	if err := os.WriteFile(source, pauseSource, 0o644); err != nil {
		return nil, err
	}
	if _, err := output("gcc", "-Os", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-Wl,--build-id=none", "-o", built, source); err != nil {
		return nil, err
	}
	return tree{"pause": {mode: 0o755, source: built}}, nil
}

// tools returns the content of the layer that the test images share: agnhost, a shell with small tools, and the tools of which the
// upstream tests use what only the real ones can do.
func tools(from inputs) (tree, error) {
	t := tree{
		"agnhost":           {mode: 0o755, source: filepath.Join(from.binaries, "agnhost")},
		"agnhost-2":         {link: "agnhost"},
		"uploads":           {mode: os.ModeDir | 0o755}, // agnhost netexec
		"tmp":               {mode: os.ModeDir | os.ModeSticky | 0o777},
		"var/tmp":           {mode: os.ModeDir | os.ModeSticky | 0o777},
		"root":              {mode: os.ModeDir | 0o700},
		"etc/passwd":        {mode: 0o644, content: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		"etc/group":         {mode: 0o644, content: []byte("root:x:0:\nnogroup:x:65534:\n")},
		"etc/wgetrc":        {mode: 0o644, content: []byte("tries = 1\n")}, // 20 otherwise; the tests count on the one of busybox' wget
		"etc/nsswitch.conf": {mode: 0o644, content: []byte("passwd: files\ngroup: files\nhosts: files dns\n")},
	}
	if err := addCertificate(t, from.kubernetes); err != nil {
		return nil, err
	}

	// Real tools, by the name that the tests call them. /bin/sh is bash, not busybox: Debian's busybox shell runs its own applets whatever
	// PATH says. Its nc lacks the flags, and its nslookup the exit status, that the tests depend on, and its wget (1.35) ends with a
	// segmentation fault here.
	real := map[string]string{
		"bin/bash": "bash", "usr/bin/curl": "curl", "usr/bin/nc": "nc.openbsd", "usr/bin/dig": "dig", "usr/bin/nslookup": "nslookup",
		"usr/bin/ss": "ss", "usr/bin/getent": "getent", "usr/bin/wget": "wget",
	}
	taken := map[string]bool{"sh": true}
	for as, command := range real {
		if err := addDynamic(t, as, command); err != nil {
			return nil, err
		}
		taken[filepath.Base(as)] = true
	}
	t["bin/sh"] = entry{link: "bash"}
	return t, addBusybox(t, taken)
}

// addBusybox adds busybox, and a link in /bin for every applet whose name is not taken.
func addBusybox(t tree, taken map[string]bool) error {
	source, err := staticBusybox()
	if err != nil {
		return err
	}
	t["bin/busybox"] = entry{mode: 0o755, source: source}
	applets, err := output(source, "--list")
	if err != nil {
		return err
	}
	for _, applet := range strings.Fields(applets) {
		if applet != "busybox" && !taken[applet] {
			t["bin/"+applet] = entry{link: "busybox"}
		}
	}
	return nil
}

// addCertificate adds the key pair that agnhost porter serves TLS with, from the sources of agnhost.
func addCertificate(t tree, kubernetes string) error {
	dir, err := output("go", "list", "-C", kubernetes, "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	for _, file := range []string{"localhost.crt", "localhost.key"} {
		t[file] = entry{mode: 0o644, source: filepath.Join(strings.TrimSpace(dir), "test/images/agnhost/porter", file)}
	}
	return nil
}
