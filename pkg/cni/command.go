// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/margay-cni/margay/pkg/ipam"
)

// The CNI library's skel package would do this too, but compiles regular expressions before main and reads the configuration twice more than
// the verbs do, which is a fifteenth of an ADD.

// Args is what a runtime calls the plugin with, besides the command: the CNI_ variables and standard input.
type Args struct {
	ContainerID   string
	Netns         string
	IfName        string
	Args          string
	Path          string
	NetnsOverride string
	StdinData     []byte
}

// verb is a command with what the specification asks of its call.
type verb struct {
	do    func(context.Context, *Args) error
	needs []string // variables
	// since is the first version of the specification that has it.
	since string
}

func (p *Plugin) verbs() map[string]verb {
	attachment := []string{"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"}
	return map[string]verb{
		"ADD":    {p.Add, attachment, versions[0]},
		"DEL":    {p.Del, []string{"CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"}, versions[0]},
		"CHECK":  {p.Check, attachment, "0.4.0"},
		"GC":     {p.GC, []string{"CNI_PATH"}, "1.1.0"},
		"STATUS": {p.Status, []string{"CNI_PATH"}, "1.1.0"},
	}
}

// command does what CNI_COMMAND says.
func (p *Plugin) command(ctx context.Context, getenv func(string) string, stdin io.Reader) error {
	name := getenv("CNI_COMMAND")
	switch name {
	case "":
		fmt.Fprintf(os.Stderr, "%s\nversions of the CNI specification: %s\n", about, strings.Join(versions, ", "))
		return nil
	case "VERSION":
		return p.printVersions()
	}
	v, ok := p.verbs()[name]
	if !ok {
		return fail(types.ErrInvalidEnvironmentVariables, nil, "CNI_COMMAND %q is none of ADD, DEL, CHECK, GC, STATUS, VERSION", name)
	}
	if missing := slices.DeleteFunc(slices.Clone(v.needs), func(key string) bool { return getenv(key) != "" }); len(missing) > 0 {
		return fail(types.ErrInvalidEnvironmentVariables, nil, "%s needs %s in its environment", name, strings.Join(missing, ", "))
	}
	conf, err := io.ReadAll(stdin)
	if err != nil {
		return fail(types.ErrIOFailure, err, "read the network configuration from standard input")
	}
	if err := v.judge(name, conf); err != nil {
		return err
	}
	return v.do(ctx, &Args{
		ContainerID: getenv("CNI_CONTAINERID"), Netns: getenv("CNI_NETNS"), IfName: getenv("CNI_IFNAME"), Args: getenv("CNI_ARGS"),
		Path: getenv("CNI_PATH"), NetnsOverride: getenv("CNI_NETNS_OVERRIDE"), StdinData: conf,
	})
}

// judge refuses a configuration whose network has no usable name, and one of a version that has no such command or is none of ours.
func (v verb) judge(name string, conf []byte) error {
	var head struct {
		CNIVersion string `json:"cniVersion"`
		Name       string `json:"name"`
	}
	if err := json.Unmarshal(conf, &head); err != nil {
		return fail(types.ErrDecodingFailure, err, "the network configuration is no JSON that fits; look at the conflist")
	}
	if err := ipam.CheckNetwork(head.Name); err != nil {
		return err
	}
	if !slices.Contains(versions, head.CNIVersion) {
		return fail(types.ErrIncompatibleCNIVersion, nil, "cniVersion %q of the configuration is none of %s", head.CNIVersion, strings.Join(versions, ", "))
	}
	if old, err := version.GreaterThanOrEqualTo(head.CNIVersion, v.since); err != nil || !old {
		return fail(types.ErrIncompatibleCNIVersion, err, "cniVersion %q of the configuration has no %s, which came with %s", head.CNIVersion, name, v.since)
	}
	return nil
}

func (p *Plugin) printVersions() error {
	err := json.NewEncoder(p.stdout).Encode(struct {
		CNIVersion string   `json:"cniVersion"`
		Supported  []string `json:"supportedVersions"`
	}{versions[len(versions)-1], versions})
	if err != nil {
		return fail(types.ErrIOFailure, err, "print the versions")
	}
	return nil
}
