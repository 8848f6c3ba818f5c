// SPDX-License-Identifier: Apache-2.0

package datapath

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// loopback is the index of the loopback device in every network namespace.
const loopback = 1

// What lets the stack take, from the loopback device, packets between its own addresses that do not carry their route with them any more:
// only the host itself can send any there.
const (
	sysctlAcceptLocal    = "/proc/sys/net/ipv4/conf/lo/accept_local"
	sysctlRouteLocalnet  = "/proc/sys/net/ipv4/conf/lo/route_localnet"
	hostSettingsDeadline = 10 * time.Second
)

// AttachHost attaches from_host to the service end of the host's pair (link.EnsureHostPair) and to_loopback to the loopback device, in the
// calling thread's network namespace, and changes the two settings of the loopback device that the answers need. Otherwise like AttachPod.
// Nothing is sent there before node_state.host_ifindex says so.
func (d *Datapath) AttachHost(peer int) error {
	if err := d.setLoopback(); err != nil {
		return err
	}
	return errors.Join(d.attach(peer, hostHooks), d.attach(loopback, loopbackHooks))
}

// HostAttached is like PodAttached for the two programs of AttachHost.
func (d *Datapath) HostAttached(peer int) error {
	return errors.Join(d.attached(peer, hostHooks), d.attached(loopback, loopbackHooks))
}

func (d *Datapath) setLoopback() error {
	ctx, cancel := context.WithTimeout(context.Background(), hostSettingsDeadline)
	defer cancel()
	unlock, err := lock(ctx, filepath.Join(d.cfg.Run, "datapath.lock"))
	if err != nil {
		return fmt.Errorf("lock the datapath: %w", err)
	}
	defer unlock()
	return errors.Join(setSysctl(d.cfg, sysctlAcceptLocal, "1"), setSysctl(d.cfg, sysctlRouteLocalnet, "1"))
}
