// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/cni"
	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/ipam"
	"github.com/margay-cni/margay/pkg/pins"
)

// lookAgain is how often --wait looks whether ADD can serve.
const lookAgain = 500 * time.Millisecond

// awaitReady returns when ADD can serve with this conflist, or why it could not when the time was over.
func awaitReady(ctx context.Context, o *options, content []byte, stdout io.Writer) error {
	deadline := time.Now().Add(o.wait)
	last := ""
	for {
		err := ready(ctx, o, content)
		if err == nil {
			return nil
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("the conflist is not installed yet, because pods could not start: %w", err)
		}
		if err.Error() != last {
			last = err.Error()
			report(stdout, "waiting", last)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lookAgain):
		}
	}
}

// ready says why ADD could not serve on this node, nil if it can: the agent has published what it knows of the cluster since the machine
// started, the programs of this build are loaded, and the plugin's own STATUS has nothing to say, ranges to give out addresses from among it.
func ready(ctx context.Context, o *options, content []byte) error {
	var list struct {
		Name    string
		Plugins []map[string]any
	}
	if err := json.Unmarshal(content, &list); err != nil {
		return fmt.Errorf("decode the conflist: %w", err)
	}
	for _, p := range list.Plugins {
		if p["type"] != pluginType {
			continue
		}
		if err := pluginReady(ctx, o, list.Name, p); err != nil {
			return err
		}
	}
	return nil
}

func pluginReady(ctx context.Context, o *options, network string, stdin map[string]any) error {
	text := func(key string) string {
		s, _ := stdin[key].(string)
		return s
	}
	run, bpffs := o.at(cmp.Or(text("runDir"), o.runDir)), o.at(cmp.Or(text("bpffs"), o.bpffs))
	_, err := endpoint.ReadNode(run)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no agent has seen the cluster since this machine started; look at the log of margay-agent: %w", err)
	}
	if err != nil {
		return err
	}
	d, err := pins.Open(pins.Config{BPFFS: bpffs, Run: run})
	if err != nil {
		return fmt.Errorf("%w: the agent loads it; look at its log", err)
	}
	if err := d.Close(); err != nil {
		return err
	}
	stdin["name"], stdin["cniVersion"], stdin["runDir"], stdin["bpffs"] = network, "1.1.0", run, bpffs
	delete(stdin, "logFile") // the plugin's, not ours
	if section, ok := stdin["ipam"].(map[string]any); ok && section["type"] != ipam.PluginType {
		delete(stdin, "ipam") // a program of the node, which may not run in our container
	}
	config, err := json.Marshal(stdin)
	if err != nil {
		return err
	}
	return cni.New(io.Discard).Status(ctx, &cni.Args{StdinData: config})
}

// requireBPFFS refuses a node without a BPF file system. A container that mounted one would have it alone: its pins would be none of the
// node's, and the plugin, which the runtime starts outside, would load programs and maps of its own.
func requireBPFFS(o *options) error {
	const place = "/sys/fs/bpf"
	var st unix.Statfs_t
	if err := unix.Statfs(o.at(place), &st); err != nil {
		return fmt.Errorf("look for a BPF file system at %s: %w", place, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("the node has no BPF file system at %s: mount it there when the node starts, as systemd does (mount -t bpf bpf %s)", place, place)
	}
	return nil
}
