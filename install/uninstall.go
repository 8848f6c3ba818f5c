// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
)

// item is one trace of Margay on the node.
type item struct {
	kind   string
	name   string
	remove func() error // a trace that is gone already is success
}

// errKept is what remove returns about something of ours that others use by now.
var errKept = errors.New("in use by others")

// uninstall removes every trace it finds, in an order in which nothing that still works is left without what it needs: first the conflist,
// so that the runtime sends no further pods, at the end the list of what was installed. What fails is reported, and the rest goes on.
func uninstall(ctx context.Context, o *options, stdout io.Writer) error {
	conn, err := link.Dial(-1)
	if err != nil {
		return err
	}
	defer conn.Close()

	inUse := users(o, conn)
	if len(inUse) > 0 && !o.force && !o.dryRun {
		return fmt.Errorf("still in use; remove the pods and stop the agent first, or give --force, which cuts them off:\n  %s", strings.Join(inUse, "\n  "))
	}
	for _, user := range inUse {
		report(stdout, "in use", user)
	}
	items, err := inventory(o, conn)
	errs := []error{err}
	for _, it := range items {
		if o.dryRun {
			report(stdout, "would remove", it.kind+" "+it.name)
			continue
		}
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		switch err := it.remove(); {
		case errors.Is(err, errKept):
			report(stdout, "kept", it.kind+" "+it.name)
		case err != nil:
			errs = append(errs, fmt.Errorf("remove %s %s: %w", it.kind, it.name, err))
		default:
			report(stdout, "removed", it.kind+" "+it.name)
		}
	}
	return errors.Join(errs...)
}

// inventory lists every trace of Margay, in the order of removal.
func inventory(o *options, conn *link.Conn) ([]item, error) {
	m, err := loadManifest(o)
	errs := []error{err}
	if m == nil {
		m = &manifest{}
	}
	items := conflistItems(o, m)
	for _, list := range []func() ([]item, error){
		func() ([]item, error) { return filterItems(o) },
		func() ([]item, error) { return deviceItems(conn) },
		routeItems,
		nftablesItems,
		func() ([]item, error) { return pinItems(o) },
		func() ([]item, error) { return mountItems(o) },
		func() ([]item, error) { return sysctlItems(o) },
	} {
		found, err := list()
		items, errs = append(items, found...), append(errs, err)
	}
	items = append(items, treeItems("run directory", o.at(o.runDir), o.runDir)...)
	items = append(items, binaryItems(o, m)...)
	items = append(items, manifestItems(o, m)...)
	return items, errors.Join(errs...)
}

// users names everything that still needs Margay: a running agent, and the pods whose device is still there.
func users(o *options, conn *link.Conn) []string {
	var found []string
	socket := o.at(filepath.Join(o.runDir, "agent.sock"))
	if c, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		c.Close()
		found = append(found, "agent listening on "+socket)
	}
	records, err := endpoint.NewStore(o.at(o.runDir)).List()
	if err != nil {
		found = append(found, fmt.Sprintf("endpoint records that cannot be read: %v", err))
	}
	for _, r := range records {
		if _, err := conn.Device(r.HostIfName); errors.Is(err, link.ErrNotFound) {
			continue // the record outlived its pod
		}
		found = append(found, describe(r))
	}
	return found
}

func describe(r *endpoint.Record) string {
	pod := "container " + r.ContainerID
	if r.Name != "" {
		pod = "pod " + r.Namespace + "/" + r.Name
	}
	addresses := make([]string, 0, len(r.Addresses))
	for _, a := range r.Addresses {
		addresses = append(addresses, a.String())
	}
	return fmt.Sprintf("%s, %s on %s: %s", pod, r.IfName, r.HostIfName, strings.Join(addresses, " "))
}

// deviceItems finds the devices that we made: those with our prefix, the overlay device, and the pair by which the host reaches services. Their
// filters, addresses and routes go with them; the second end of a pair is gone with the first.
func deviceItems(conn *link.Conn) ([]item, error) {
	devices, err := conn.Devices()
	if err != nil {
		return nil, err
	}
	var items []item
	for _, d := range devices {
		if isOurs(d.Name, d.Kind, d.Alias) {
			items = append(items, item{"device", d.Name, func() error { return conn.Delete(d.Index) }})
		}
	}
	return items, nil
}
