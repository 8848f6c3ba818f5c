// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/margay-cni/margay/conf"
)

// What goes into the runtime's plugin directory, and what people run. The loader comes before the plugin that runs it.
var (
	plugins = []string{"margay-loader", "margay", "margay-ipam"}
	tools   = []string{"margay-agent", "margayctl", "margay-install"}
)

// pluginType is the type that a conflist of ours names.
const pluginType = "margay"

// install copies what differs. The conflist comes last: as soon as it is there the runtime calls the plugins. The list of what was
// installed is written before the first file, so that a killed run can be uninstalled, and with the conflist's digest at the end.
func install(ctx context.Context, o *options, stdout io.Writer) error {
	content, err := conflistContent(o.conflist)
	if err != nil {
		return err
	}
	if o.requireBPFFS {
		if err := requireBPFFS(o); err != nil {
			return err
		}
	}
	binaries, err := sources(o)
	if err != nil {
		return err
	}
	m, err := loadManifest(o)
	if err != nil {
		return err
	}
	if !o.dryRun {
		if err := prepare(o, m, binaries); err != nil {
			return err
		}
	}
	for _, b := range binaries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := installBinary(o, b, stdout); err != nil {
			return err
		}
	}
	if !o.binariesOnly {
		if err := installConflist(ctx, o, m, content, stdout); err != nil {
			return err
		}
	}
	if err := warnOfRivals(o, stdout); err != nil || o.dryRun {
		return err
	}
	return m.save(o)
}

// binary is one file to copy: from here to a path of the node.
type binary struct{ from, to string }

// sources finds every binary before anything is touched: a half-installed node is worse than none.
func sources(o *options) ([]binary, error) {
	var found []binary
	var errs []error
	add := func(dir string, names []string) {
		for _, name := range names {
			b := binary{from: filepath.Join(o.sourceDir, name), to: filepath.Join(dir, name)}
			if info, err := os.Stat(b.from); err != nil {
				errs = append(errs, fmt.Errorf("find %s (see --source-dir): %w", name, err))
			} else if !info.Mode().IsRegular() {
				errs = append(errs, fmt.Errorf("%s is no file", b.from))
			}
			found = append(found, b)
		}
	}
	if o.conflistOnly {
		return nil, nil
	}
	add(o.cniBinDir, plugins)
	if o.binDir != "" {
		add(o.binDir, tools)
	}
	return found, errors.Join(errs...)
}

// prepare makes the directories and writes down what is about to be installed.
func prepare(o *options, m *manifest, binaries []binary) error {
	dirs := []string{o.stateDir, o.cniConfDir}
	if !o.conflistOnly {
		dirs = append(dirs, o.cniBinDir)
	}
	if !o.conflistOnly && o.binDir != "" {
		dirs = append(dirs, o.binDir)
	}
	for _, dir := range dirs {
		if err := m.ensureDir(o, dir); err != nil {
			return err
		}
	}
	for _, b := range binaries {
		m.addBinary(b.to)
	}
	slices.Sort(m.Binaries)
	m.Version = version
	return m.save(o)
}

func installBinary(o *options, b binary, stdout io.Writer) error {
	content, err := os.ReadFile(b.from)
	if err != nil {
		return fmt.Errorf("read %s: %w", b.from, err)
	}
	return place(o, b.to, content, 0o755, stdout)
}

// place writes one file of the node, or says what it would do, and prints a line about it.
func place(o *options, path string, content []byte, mode fs.FileMode, stdout io.Writer) error {
	if o.dryRun {
		same, err := holds(o.at(path), content, mode)
		if err != nil {
			return err
		}
		report(stdout, pick(same, "unchanged", "would install"), path)
		return nil
	}
	changed, err := writeFile(o.at(path), content, mode)
	if err != nil {
		return err
	}
	report(stdout, pick(changed, "installed", "unchanged"), path)
	return nil
}

// installConflist keeps a conflist that somebody has edited: every real node has its own address ranges in it. With --conflist-only one that
// has to be written waits until the runtime may start pods; one that is in place already is no business of the agent's, so that an agent
// that starts again needs nobody.
func installConflist(ctx context.Context, o *options, m *manifest, content []byte, stdout io.Writer) error {
	path := o.conflistPath()
	have, err := os.ReadFile(o.at(path))
	missing := errors.Is(err, fs.ErrNotExist)
	switch {
	case err != nil && !missing:
		return fmt.Errorf("read the installed conflist: %w", err)
	case missing || digest(have) == digest(content):
	case !o.force && digest(have) != m.Conflists[path]:
		report(stdout, "kept", path+" (edited on this node; --force replaces it)")
		return nil
	}
	if o.conflistOnly && digest(have) != digest(content) {
		if err := awaitReady(ctx, o, content, stdout); err != nil {
			return err
		}
	}
	if err := place(o, path, content, 0o644, stdout); err != nil {
		return err
	}
	m.Conflists[path] = digest(content)
	return nil
}

// warnOfRivals names the files that a runtime takes instead of our conflist. They are another's, so they stay.
func warnOfRivals(o *options, stdout io.Writer) error {
	entries, err := os.ReadDir(o.at(o.cniConfDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("look for other configurations: %w", err)
	}
	for _, e := range entries {
		if isConfiguration(e.Name()) && e.Name() < conf.ConflistName {
			report(stdout, "warning", fmt.Sprintf("%s sorts before %s: the runtime takes it, and new pods do not get Margay; remove it once its plugin is gone",
				filepath.Join(o.cniConfDir, e.Name()), conf.ConflistName))
		}
	}
	return nil
}

// isConfiguration tells what containerd and CRI-O read.
func isConfiguration(name string) bool {
	return slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name))
}

// conflistContent returns the conflist to install. A runtime that finds a broken one takes the node out of service, so it is looked
// at first; the plugin judges the details.
func conflistContent(file string) ([]byte, error) {
	if file == "" {
		return conf.Conflist, nil
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the conflist: %w", err)
	}
	var list struct {
		Name    string
		Plugins []struct{ Type string }
	}
	if err := json.Unmarshal(content, &list); err != nil {
		return nil, fmt.Errorf("decode the conflist %s: %w", file, err)
	}
	if list.Name == "" {
		return nil, fmt.Errorf("conflist %s has no name", file)
	}
	if !slices.ContainsFunc(list.Plugins, func(p struct{ Type string }) bool { return p.Type == pluginType }) {
		return nil, fmt.Errorf("conflist %s has no plugin of type %q", file, pluginType)
	}
	return content, nil
}

// report prints one line: what happened to what.
func report(w io.Writer, what, object string) {
	fmt.Fprintf(w, "%-14s%s\n", what, object)
}

func pick(condition bool, yes, no string) string {
	if condition {
		return yes
	}
	return no
}
