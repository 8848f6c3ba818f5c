// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// subscribe tells of every change of a device, address, route or rule, and of every device that lost a filter, until ctx ends. Messages
// only say that something changed: what is true is read afresh, so that a lost message costs nothing but time.
func subscribe(ctx context.Context, changes mailbox[struct{}], removals chan<- int) error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_TC)
	if err != nil {
		return fmt.Errorf("subscribe to changes of the network: %w", err)
	}
	return receiveAll(ctx, s, func(messages []syscall.NetlinkMessage, lost bool) {
		if lost {
			tellRemoved(removals, 0)
		}
		if distribute(messages, removals) || lost {
			changes.put(struct{}{})
		}
	})
}

// subscribeTransforms tells of every change of an xfrm policy, until ctx ends. A kernel without xfrm has nothing to tell.
func subscribeTransforms(ctx context.Context, changes mailbox[struct{}]) error {
	s, err := nl.Subscribe(unix.NETLINK_XFRM, nl.XFRMNLGRP_POLICY)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("subscribe to changes of xfrm policies: %w", err)
	}
	return receiveAll(ctx, s, func([]syscall.NetlinkMessage, bool) { changes.put(struct{}{}) })
}

// receiveAll passes on what the socket says, and when messages may be lost, until ctx ends. It closes the socket.
func receiveAll(ctx context.Context, s *nl.NetlinkSocket, tell func(messages []syscall.NetlinkMessage, lost bool)) error {
	stop := context.AfterFunc(ctx, s.Close)
	defer func() {
		if stop() {
			s.Close()
		}
	}()
	for {
		messages, _, err := s.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			tell(messages, false)
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
			tell(nil, true)
		default:
			return fmt.Errorf("receive changes from the kernel: %w", err)
		}
	}
}

// distribute passes on which devices lost a filter or a qdisc, and tells whether there was news of anything but traffic control.
func distribute(messages []syscall.NetlinkMessage, removals chan<- int) (other bool) {
	for _, m := range messages {
		switch m.Header.Type {
		case unix.RTM_DELTFILTER, unix.RTM_DELQDISC:
			if len(m.Data) >= nl.SizeofTcMsg {
				tellRemoved(removals, int(nl.DeserializeTcMsg(m.Data).Ifindex))
			}
		case unix.RTM_NEWTFILTER, unix.RTM_NEWQDISC, unix.RTM_NEWCHAIN, unix.RTM_DELCHAIN:
		default:
			other = true
		}
	}
	return other
}

// tellRemoved does not wait: where nobody keeps up, the next tick looks at every device anyway.
func tellRemoved(removals chan<- int, index int) {
	select {
	case removals <- index:
	default:
	}
}
