// SPDX-License-Identifier: Apache-2.0

package endpoint

import (
	"github.com/margay-cni/margay/pkg/jsonwrite"
)

// encode returns the record's file. It writes what encoding/json would, whose way to it is a twentieth of an ADD; a test compares the two for
// every field.
func (r *Record) encode() ([]byte, error) {
	var o jsonwrite.Object
	o.Int("version", r.Version)
	o.String("containerID", r.ContainerID)
	o.String("ifName", r.IfName)
	o.String("netns", r.Netns)
	o.OmitString("netnsID", r.NetnsID)
	o.OmitString("hostNetnsID", r.HostNetnsID)
	o.String("network", r.Network)
	o.OmitString("ipam", r.IPAM)
	o.OmitString("ipamRunDir", r.IPAMRun)
	o.OmitString("namespace", r.Namespace)
	o.OmitString("name", r.Name)
	o.OmitString("uid", r.UID)
	if len(r.Labels) > 0 {
		if err := o.Any("labels", r.Labels); err != nil {
			return nil, err
		}
	}
	o.Raw("addresses", r.addresses())
	o.String("mac", r.MAC)
	o.String("hostMAC", r.HostMAC)
	o.String("hostIfName", r.HostIfName)
	o.Int("hostIfindex", r.HostIfindex)
	o.OmitTrue("adopted", r.Adopted)
	o.OmitTrue("followMTU", r.FollowMTU)
	o.OmitString("policy", r.Policy)
	if len(r.HostPorts) > 0 {
		if err := o.Any("hostPorts", r.HostPorts); err != nil {
			return nil, err
		}
	}
	created, err := r.Created.MarshalJSON()
	if err != nil {
		return nil, err
	}
	o.Raw("created", created)
	return append(o.Bytes(), '\n'), nil
}

func (r *Record) addresses() []byte {
	if r.Addresses == nil {
		return []byte("null")
	}
	var list [][]byte
	for _, a := range r.Addresses {
		text := ""
		if a.IsValid() {
			text = a.String()
		}
		list = append(list, jsonwrite.Text(text))
	}
	return jsonwrite.List(list...)
}
