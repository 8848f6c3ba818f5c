// SPDX-License-Identifier: Apache-2.0

// Command margay-ipam is the CNI IPAM plugin: it leases addresses of the network's ranges to pod interfaces. The work is done by
// pkg/ipam, which also documents state and configuration; this command is for main plugins other than margay, which calls pkg/ipam
// itself. The configuration comes on standard input, the rest in CNI_* variables, result and errors go to standard output
// (CNI specification 0.3.0 to 1.1.0).
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/margay-cni/margay/pkg/ipam"
)

// timeout ends a call long before any runtime gives up on it, so that the runtime gets an answer that says why.
const timeout = 30 * time.Second

func main() {
	os.Exit(run(context.Background()))
}

// run serves the one call that the environment asks for.
func run(ctx context.Context) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cniVersion := ""
	// with hands each call its configuration.
	with := func(call func(context.Context, *ipam.Config, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error {
			c, err := ipam.LoadConfig(args.StdinData, args.Args)
			if err != nil {
				return err
			}
			cniVersion = c.CNIVersion
			return call(ctx, c, args)
		}
	}
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add:    with(add),
		Del:    with(del),
		Check:  with(check),
		GC:     with(gc),
		Status: with(status),
	}, version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"), "margay-ipam: CNI IPAM plugin of Margay")
	if err == nil {
		return 0
	}
	if err := printError(cniVersion, err); err != nil {
		fmt.Fprintln(os.Stderr, "print CNI error:", err)
	}
	return 1
}

// printError prints the error as the specification wants it, with the version, which skel leaves out.
func printError(cniVersion string, e *types.Error) error {
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "    ")
	return out.Encode(struct {
		CNIVersion string `json:"cniVersion,omitempty"`
		*types.Error
	}{cniVersion, e})
}

func attachment(args *skel.CmdArgs) ipam.Attachment {
	return ipam.Attachment{ContainerID: args.ContainerID, IfName: args.IfName, Netns: args.Netns}
}

func add(ctx context.Context, c *ipam.Config, args *skel.CmdArgs) error {
	assignment, err := ipam.Add(ctx, c, attachment(args))
	if err != nil {
		return err
	}
	return types.PrintResult(assignment.Result(), c.CNIVersion)
}

func del(ctx context.Context, c *ipam.Config, args *skel.CmdArgs) error {
	return ipam.Del(ctx, c, attachment(args))
}

func check(ctx context.Context, c *ipam.Config, args *skel.CmdArgs) error {
	return ipam.Check(ctx, c, attachment(args), c.PrevIPs)
}

func gc(ctx context.Context, c *ipam.Config, _ *skel.CmdArgs) error {
	_, err := ipam.GC(ctx, c, c.Valid)
	return err
}

func status(ctx context.Context, c *ipam.Config, _ *skel.CmdArgs) error {
	return ipam.Status(ctx, c)
}
