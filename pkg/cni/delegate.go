// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// The CNI library's invoke package would do this too, but it brings an HTTP server and TLS along (for trace propagation), which is a third
// of a plugin's size and start-up time.

// delegateGrace is what a plugin that was told to stop gets before it is killed.
const delegateGrace = 2 * time.Second

// delegate runs another plugin with the command, our arguments and our standard input, and returns what it printed. A plugin that fails
// says why on its standard output, as a CNI error, which is returned as such.
func delegate(ctx context.Context, path, command string, args *Args) ([]byte, error) {
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = append(os.Environ(), // the last one of a name counts
		"CNI_COMMAND="+command, "CNI_CONTAINERID="+args.ContainerID, "CNI_NETNS="+args.Netns, "CNI_ARGS="+args.Args,
		"CNI_IFNAME="+args.IfName, "CNI_PATH="+args.Path)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(args.StdinData), &out, &errOut
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = delegateGrace
	err := cmd.Run()
	if err == nil {
		return out.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s was stopped: %w", path, ctx.Err())
	}
	var said types.Error
	if json.Unmarshal(out.Bytes(), &said) == nil && (said.Code != 0 || said.Msg != "") {
		return nil, &said
	}
	return nil, fmt.Errorf("%s: %w; it said: %s", path, err, strings.TrimSpace(errOut.String()+" "+out.String()))
}

// findPlugin looks a plugin up in CNI_PATH.
func findPlugin(name, cniPath string) (string, error) {
	var faults []error
	for _, dir := range filepath.SplitList(cniPath) {
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		if err == nil && info.Mode().IsRegular() {
			return path, nil
		}
		if err == nil {
			err = fmt.Errorf("%s is no file", path)
		}
		faults = append(faults, err)
	}
	if len(faults) == 0 {
		return "", errors.New("CNI_PATH is empty")
	}
	return "", errors.Join(faults...)
}

// decodeResult reads a plugin's result. Before version 1.0.0 results need not carry their version: it is the configuration's.
func decodeResult(data []byte, confVersion string) (*types100.Result, error) {
	version, err := create.DecodeVersion(data)
	if err != nil {
		return nil, err
	}
	var head struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, err
	}
	if head.CNIVersion == "" {
		version = confVersion
	}
	raw, err := create.Create(version, data)
	if err != nil {
		return nil, err
	}
	return types100.NewResultFromResult(raw)
}
