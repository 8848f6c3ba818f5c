// SPDX-License-Identifier: Apache-2.0

// Manifests renders the Helm chart with its default values into the file that `kubectl apply -f` takes, so that both ways of installing make
// the same objects.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
)

// namespace is where everything is that has one. In every cluster it may have pods of the highest priority.
const namespace = "kube-system"

const header = `# Margay for a cluster: kubectl apply -f margay.yaml. docs/kubernetes.md says what to look at first.
# Rendered from the Helm chart install/helm/margay by "make manifests": change it there.
`

// order is in which order the chart's templates come: what others name first.
var order = []string{"rbac.yaml", "configmap.yaml", "daemonset.yaml"}

func main() {
	os.Exit(run(os.Args[1:], os.Stderr))
}

// run is main without the process.
func run(args []string, stderr io.Writer) int {
	f := flag.NewFlagSet("manifests", flag.ContinueOnError)
	f.SetOutput(stderr)
	chart := f.String("chart", "install/helm/margay", "`directory` of the chart")
	output := f.String("output", "install/kubernetes/margay.yaml", "`file` to write")
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil || f.NArg() > 0 {
		return 2
	}
	text, err := render(*chart, nil)
	if err == nil {
		err = os.WriteFile(*output, []byte(header+text), 0o644)
	}
	if err != nil {
		fmt.Fprintln(stderr, "manifests:", err)
		return 1
	}
	return 0
}

// render returns what helm install would send to a cluster, with these values in place of the default ones.
func render(dir string, values map[string]any) (string, error) {
	chart, err := loader.LoadDir(dir)
	if err != nil {
		return "", fmt.Errorf("load the chart: %w", err)
	}
	release := common.ReleaseOptions{Name: "margay", Namespace: namespace, IsInstall: true, Revision: 1}
	all, err := util.ToRenderValues(chart, values, release, common.DefaultCapabilities)
	if err != nil {
		return "", fmt.Errorf("values: %w", err)
	}
	e := engine.Engine{Strict: true}
	files, err := e.RenderWithContext(context.Background(), chart, all)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for _, name := range order {
		file := path.Join(chart.Name(), "templates", name)
		fmt.Fprintf(&out, "---\n%s\n", strings.Trim(files[file], "\n"))
		delete(files, file)
	}
	for file, text := range files {
		if !slices.Contains([]string{".txt", ".tpl"}, path.Ext(file)) && strings.TrimSpace(text) != "" {
			return "", fmt.Errorf("template %s has no place in the order", file)
		}
	}
	return out.String(), nil
}
