// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/pkg/endpoint"
	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/netns"
)

// presence is what can be said about the network namespace of an ADD.
type presence int

const (
	unknown presence = iota // in doubt it is alive
	there
	gone
)

// namespaceAt says whether the namespace id that was at path at ADD still is; the zero id stands for any. sameView says that whoever made the
// path and the caller see the same files and processes, as a plugin and its runtime do. An agent in a container may not: where mounts are
// not passed on to it a living namespace looks like an empty file, and where it has not got the machine's processes none of theirs is there.
func namespaceAt(path string, id netns.ID, sameView bool) presence {
	if path == "" {
		return unknown
	}
	sees := sameView
	if strings.HasPrefix(path, "/proc/") {
		sees = sees || seesProcesses()
	} else if _, err := os.Stat(filepath.Dir(path)); err == nil {
		sees = true // a name in the directory, or none, is the same to everybody
	}
	have, err := netns.Identify(path)
	switch {
	case err == nil && (have == id || id == netns.ID{}):
		return there
	case errors.Is(err, netns.ErrNotNamespace):
		sees = sameView
	case err == nil: // another namespace has the path by now
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH):
	default:
		return unknown
	}
	if !sees {
		return unknown
	}
	return gone
}

// machineProcesses names the first PID namespace, the machine's: its inode is a constant of the kernel (PROC_PID_INIT_INO, proc_ns.h).
const machineProcesses = "pid:[4026531836]"

func seesProcesses() bool {
	name, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && name == machineProcesses
}

// hasDevice says whether the record's host-side device exists. As long as it does, so does the pod's namespace, whatever its path says: the
// kernel removes both ends of a pair with either namespace.
func hasDevice(devices []link.Device, r *endpoint.Record) bool {
	for _, d := range devices {
		sameIndex := d.Index == r.HostIfindex && (d.Name == r.HostIfName || d.MAC.String() == r.HostMAC) // it may have got another name
		if sameIndex || !r.Adopted && d.Name == link.HostName(r.ContainerID, r.IfName) {
			return true
		}
	}
	return false
}

// isDead says whether nothing is left of the record's pod: neither its device nor its namespace. devices are those of the namespace home.
func isDead(devices []link.Device, home netns.ID, r *endpoint.Record) bool {
	if host := netns.ParseID(r.HostNetnsID); host != home && host != (netns.ID{}) {
		return false // its device is where we do not see it
	}
	return !hasDevice(devices, r) && namespaceAt(r.Netns, netns.ParseID(r.NetnsID), false) != there
}
