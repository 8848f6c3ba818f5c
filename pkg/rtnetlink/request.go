// SPDX-License-Identifier: Apache-2.0

package rtnetlink

import (
	"encoding/binary"
	"iter"

	"golang.org/x/sys/unix"
)

// native is the byte order of everything in a message that is not said to be another.
var native = binary.NativeEndian

// Request is one message: a fixed part, which depends on its kind, and attributes.
type Request struct {
	data []byte
}

// NewRequest begins a message. kind is RTM_NEWLINK or the like, flags are its NLM_F_ flags, of which NLM_F_REQUEST goes without saying, and
// fixed is the structure behind the header, such as struct ifinfomsg.
func NewRequest(kind, flags uint16, fixed []byte) *Request {
	r := &Request{data: make([]byte, unix.SizeofNlMsghdr, 256)}
	native.PutUint16(r.data[4:], kind)
	native.PutUint16(r.data[6:], flags|unix.NLM_F_REQUEST)
	r.Raw(fixed)
	return r
}

// Raw appends bytes that are no attribute, such as another message's fixed part within a nest.
func (r *Request) Raw(b []byte) {
	r.data = append(r.data, b...)
	r.align()
}

func (r *Request) align() {
	for len(r.data)%unix.NLMSG_ALIGNTO != 0 {
		r.data = append(r.data, 0)
	}
}

// Bytes appends an attribute.
func (r *Request) Bytes(kind uint16, value []byte) {
	r.data = native.AppendUint16(r.data, uint16(unix.SizeofRtAttr+len(value)))
	r.data = native.AppendUint16(r.data, kind)
	r.Raw(value)
}

// Uint32 appends an attribute.
func (r *Request) Uint32(kind uint16, value uint32) {
	var b [4]byte
	native.PutUint32(b[:], value)
	r.Bytes(kind, b[:])
}

// String appends an attribute that ends with a zero byte.
func (r *Request) String(kind uint16, value string) {
	r.Bytes(kind, append([]byte(value), 0))
}

// Nest appends an attribute that consists of what fill appends.
func (r *Request) Nest(kind uint16, fill func()) {
	at := len(r.data)
	r.Bytes(kind, nil)
	fill()
	native.PutUint16(r.data[at:], uint16(len(r.data)-at))
}

// Attributes goes through the attributes that b consists of, kind and value. It ends at the first one that does not fit.
func Attributes(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= unix.SizeofRtAttr {
			size := int(native.Uint16(b))
			if size < unix.SizeofRtAttr || size > len(b) {
				return
			}
			if !yield(native.Uint16(b[2:])&^unix.NLA_F_NESTED, b[unix.SizeofRtAttr:size]) {
				return
			}
			b = b[min(len(b), (size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
		}
	}
}
