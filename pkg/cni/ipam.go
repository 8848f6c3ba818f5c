// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/margay-cni/margay/pkg/ipam"
)

// Starting a process is most of an ADD's cost, so our own IPAM plugin is called in-process; any other one is executed as the
// specification has it. Both are given the whole standard input.

func (at *attachment) ownIPAM() bool {
	return at.conf.IPAM.Type == ipam.PluginType
}

func (at *attachment) ipamConfig() (*ipam.Config, ipam.Attachment, error) {
	c, err := ipam.LoadConfig(at.args.StdinData, at.args.Args)
	if err == nil {
		c.PollLock = at.pollLocks
	}
	return c, ipam.Attachment{
		ContainerID: at.args.ContainerID, IfName: at.args.IfName, Netns: at.args.Netns,
		PodNamespace: at.pod.namespace, PodName: at.pod.name,
	}, err
}

// leaseRun is the run directory of margay-ipam's leases where it is not the plugin's own; else empty. It is decoded once.
func (at *attachment) leaseRun() string {
	if at.leases == nil {
		run := at.decodeLeaseRun()
		at.leases = &run
	}
	return *at.leases
}

func (at *attachment) decodeLeaseRun() string {
	var section struct {
		IPAM struct {
			RunDir string `json:"runDir"`
		} `json:"ipam"`
	}
	if !at.ownIPAM() || json.Unmarshal(at.args.StdinData, &section) != nil || section.IPAM.RunDir == at.conf.RunDir {
		return ""
	}
	return section.IPAM.RunDir
}

// allocate gets the pod's addresses. A failed plugin is told to release what it may have taken; our own has taken nothing then. repeated
// says that the pod held the addresses before.
func (at *attachment) allocate(ctx context.Context) (r *types100.Result, repeated bool, err error) {
	if at.ownIPAM() {
		c, who, err := at.ipamConfig()
		if err != nil {
			return nil, false, at.ipamError(err, "ADD")
		}
		given, err := ipam.Add(ctx, c, who)
		if err != nil {
			return nil, false, at.ipamError(err, "ADD")
		}
		return given.Result(), given.Repeated, nil
	}
	path, err := at.delegatePath()
	if err != nil {
		return nil, false, err
	}
	out, err := delegate(ctx, path, "ADD", at.args)
	if err == nil {
		r, err = decodeResult(out, at.conf.CNIVersion)
	}
	if err != nil {
		ctx, cancel := cleanupContext(ctx)
		defer cancel()
		return nil, false, at.ipamError(errors.Join(err, at.release(ctx)), "ADD")
	}
	return r, false, nil
}

// release gives the pod's addresses back. Nothing to give back is success.
func (at *attachment) release(ctx context.Context) error {
	if at.conf.IPAM.Type == "" {
		return nil
	}
	return at.ipamCommand(ctx, "DEL", ipam.Del)
}

// checkLease asks whether the pod still has its addresses.
func (at *attachment) checkLease(ctx context.Context, have []netip.Addr) error {
	return at.ipamCommand(ctx, "CHECK", func(ctx context.Context, c *ipam.Config, who ipam.Attachment) error {
		return ipam.Check(ctx, c, who, have)
	})
}

func (at *attachment) ipamStatus(ctx context.Context) error {
	return at.ipamCommand(ctx, "STATUS", func(ctx context.Context, c *ipam.Config, _ ipam.Attachment) error {
		return ipam.Status(ctx, c)
	})
}

func (at *attachment) ipamGC(ctx context.Context) error {
	return at.ipamCommand(ctx, "GC", func(ctx context.Context, c *ipam.Config, _ ipam.Attachment) error {
		_, err := ipam.GC(ctx, c, c.Valid)
		return err
	})
}

// ipamCommand runs a command without a result, in-process or as a delegate.
func (at *attachment) ipamCommand(ctx context.Context, command string, own func(context.Context, *ipam.Config, ipam.Attachment) error) error {
	if at.ownIPAM() {
		c, who, err := at.ipamConfig()
		if err == nil {
			err = own(ctx, c, who)
		}
		return at.ipamError(err, command)
	}
	path, err := at.delegatePath()
	if err != nil {
		return err
	}
	_, err = delegate(ctx, path, command, at.args)
	return at.ipamError(err, command)
}

func (at *attachment) ipamError(err error, command string) error {
	if err == nil {
		return nil
	}
	return fail(codeIPAM, err, "IPAM plugin %s, %s", at.conf.IPAM.Type, command)
}

func (at *attachment) delegatePath() (string, error) {
	path, err := findPlugin(at.conf.IPAM.Type, at.args.Path)
	if err != nil {
		return "", fail(types.ErrInvalidNetworkConfig, err,
			"ipam.type names %s, which is not in CNI_PATH (%s): install it or correct the conflist", at.conf.IPAM.Type, at.args.Path)
	}
	return path, nil
}
