// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/margay-cni/margay/test/cluster/lab"
)

// sigNetwork begins the name of every test of the SIG.
const sigNetwork = "[sig-network]"

// runner runs test programs on one cluster.
type runner struct {
	cluster  *lab.Cluster
	options  options
	selected selection
}

// bin returns the path of a built binary.
func (r runner) bin(name string) string { return filepath.Join(r.cluster.Dir, "bin", name) }

// focus is the expression of the tests to run. Without the group base only what the other groups claim.
func (r runner) focus() string {
	focus := regexp.QuoteMeta(sigNetwork)
	if !r.selected[base] {
		var patterns []string
		for _, c := range categories {
			if r.selected[c.group] {
				patterns = append(patterns, c.pattern)
			}
		}
		focus += ".*(" + strings.Join(patterns, "|") + ")"
	}
	if r.options.focus != "" {
		focus += ".*(" + r.options.focus + ")"
	}
	return focus
}

// e2e runs Kubernetes' end-to-end tests. An error together with a report means that the run did not end well.
// nodes is said to the tests: what they find out by themselves does not reach the processes that ginkgo starts, in which every test that
// wants two nodes would then be skipped.
func (r runner) e2e(ctx context.Context, nodes int) (report, error) {
	out := filepath.Join(r.options.reports, "e2e")
	if err := os.RemoveAll(out); err != nil { // an old report must not be taken for the new one
		return report{}, err
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return report{}, err
	}
	argv := []string{
		r.bin("ginkgo"), fmt.Sprintf("--procs=%d", r.options.procs), "--timeout=" + r.options.timeout.String(), "--no-color", "-v",
		"--focus=" + r.focus(), "--skip=" + r.selected.skip(), r.bin("e2e.test"), "--",
		"--kubeconfig=" + r.cluster.Kubeconfig(), "--kubectl-path=" + r.bin("kubectl"), "--provider=skeleton", "--dns-domain=cluster.local",
		fmt.Sprintf("--num-nodes=%d", nodes), "--allowed-not-ready-nodes=0", "--minStartupPods=0", "--dump-logs-on-failure=true",
		"--e2e-output-dir=" + out, "--report-dir=" + out,
	}
	runErr := r.logged(ctx, filepath.Join(out, "ginkgo.log"), &progress{to: os.Stdout}, argv)
	got, err := readReport(filepath.Join(out, "junit_01.xml"), sigNetwork)
	return got, errors.Join(runErr, err)
}

// logged runs a command with its output in a file, its standard error in one beside it, and a copy of the output to shown.
func (r runner) logged(ctx context.Context, path string, shown io.Writer, argv []string) (err error) {
	log, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, log.Close()) }()
	errorLog, err := os.Create(path + ".stderr")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, errorLog.Close()) }()
	// Longer than the suite's own limit, which ends it in an orderly way and with a report.
	ctx, cancel := context.WithTimeout(ctx, r.options.timeout+10*time.Minute)
	defer cancel()
	cmd, err := r.cluster.Command(ctx, argv...)
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = io.MultiWriter(log, shown), errorLog
	// The names of the images are those that were packed, whatever the caller's shell says.
	cmd.Env = append(cmd.Env, "KUBE_TEST_REPO_LIST=", "KUBE_TEST_REPO=")
	fmt.Printf("running %s; its output: %s\n", filepath.Base(argv[0]), path)
	if err := runGroup(cmd, 5*time.Minute); err != nil {
		return fmt.Errorf("%s: %w, see %s", filepath.Base(argv[0]), err, path)
	}
	return nil
}

// runGroup runs a command and leaves no process of it behind. When the command's context ends, it is interrupted, so that a suite cleans up
// and reports; after grace it is killed, and so are the processes that it started: without their parent they would go on with their tests.
func runGroup(cmd *exec.Cmd, grace time.Duration) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = grace
	if err := cmd.Start(); err != nil {
		return err
	}
	// Numbers are given out in turn, so the group has it still, or nobody has.
	group := cmd.Process.Pid
	err := cmd.Wait()
	if killErr := syscall.Kill(-group, syscall.SIGKILL); killErr != nil && !errors.Is(killErr, syscall.ESRCH) {
		err = errors.Join(err, fmt.Errorf("end what %s left: %w", filepath.Base(cmd.Path), killErr))
	}
	return err
}

// unaccounted returns an error for tests that were not run although nothing leaves them out, or that skipped themselves for a reason that is
// not known: on a cluster of three dual-stack nodes, what is missing may be our fault. With a focus, part of that is what was asked for.
func (s suite) unaccounted() error {
	var faults []error
	for _, t := range s.tests {
		switch {
		case t.outcome == notRun && s.whyNot(t.name) == "":
			faults = append(faults, fmt.Errorf("%s was not run, and nobody knows why", t.name))
		case t.outcome == skipped && !slices.Contains(knownSkips, t.note):
			faults = append(faults, fmt.Errorf("%s skipped itself: %s", t.name, t.note))
		}
	}
	return errors.Join(faults...)
}

// checkImages compares the images that were packed with those that the tests ask for: of a repository that we have, the tag must be there
// too. Otherwise an upgrade would only show in pods that never start.
func (r runner) checkImages(ctx context.Context) error {
	listed, err := exec.CommandContext(ctx, r.bin("e2e.test"), "--list-images").Output()
	if err != nil {
		return fmt.Errorf("list the images of the tests: %w: build it with go run ./test/cluster build", err)
	}
	packed, err := packedImages(filepath.Join(r.cluster.Dir, "images"))
	if err != nil {
		return err
	}
	return missingImages(strings.Fields(string(listed)), packed)
}

// missingImages returns an error that names the wanted images whose repository is packed, but not with that tag.
func missingImages(wanted, packed []string) error {
	repositories := map[string]bool{}
	for _, image := range packed {
		repositories[repository(image)] = true
	}
	var missing []string
	for _, image := range wanted {
		if repositories[repository(image)] && !slices.Contains(packed, image) {
			missing = append(missing, image)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("the tests want images that are not packed: %s: name them in test/cluster/images", strings.Join(missing, ", "))
	}
	return nil
}

// repository returns an image's name without its tag.
func repository(image string) string {
	if colon := strings.LastIndex(image, ":"); colon > strings.LastIndex(image, "/") {
		return image[:colon]
	}
	return image
}

// packedImages returns the names in the docker-archives of a directory.
func packedImages(dir string) ([]string, error) {
	archives, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		return nil, err
	}
	if len(archives) == 0 {
		return nil, fmt.Errorf("no images in %s", dir)
	}
	var names []string
	for _, path := range archives {
		tags, err := imageNames(path)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		names = append(names, tags...)
	}
	return names, nil
}

// imageNames returns the names in one docker-archive.
func imageNames(path string) ([]string, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() // only read from
	for t := tar.NewReader(file); ; {
		h, err := t.Next()
		if err != nil {
			return nil, fmt.Errorf("look for manifest.json: %w", err)
		}
		if h.Name != "manifest.json" {
			continue
		}
		var manifest []struct{ RepoTags []string }
		if err := json.NewDecoder(t).Decode(&manifest); err != nil {
			return nil, err
		}
		var names []string
		for _, image := range manifest {
			names = append(names, image.RepoTags...)
		}
		return names, nil
	}
}
