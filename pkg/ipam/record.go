// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"encoding/binary"
	"hash/crc32"
	"hash/fnv"
	"net/netip"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/margay-cni/margay/pkg/addr"
)

const (
	cellSize   = 64
	leaseCells = 8
	leaseSize  = leaseCells * cellSize

	// maxAddrs is how many addresses one lease holds at most: one of each range set.
	maxAddrs = 8

	addrMagic  uint32 = 0x7264646d // "mddr"
	leaseMagic uint32 = 0x7361656c // "leas"
)

var le = binary.LittleEndian

type cell [cellSize]byte

// addrState is what is known of an address. Unknown addresses have no record: they were never leased since the state was made.
type addrState uint8

const (
	leased   addrState = 1
	released addrState = 2
)

// addrRecord is one cell of the address table. Record number 0 means none wherever a number is stored.
type addrRecord struct {
	addr     netip.Addr
	released time.Duration // since boot; meaningful when state is released
	state    addrState
	chain    uint32 // next record of the same bucket, or of the free list
	prev     uint32 // neighbours in the range's queue of released addresses
	next     uint32
	rangeNo  uint32 // the range's number + 1; 0: in none of the configured ranges
	lease    uint32 // holder
}

func (r *addrRecord) encode(c *cell) {
	*c = cell{}
	if r.state == 0 {
		le.PutUint32(c[40:], r.chain)
		return
	}
	le.PutUint32(c[0:], addrMagic)
	b := addr.As16(r.addr)
	copy(c[8:], b[:])
	le.PutUint64(c[24:], uint64(r.released))
	c[32] = byte(r.state)
	le.PutUint32(c[4:], crc32.ChecksumIEEE(c[8:40]))
	for i, v := range []uint32{r.chain, r.prev, r.next, r.rangeNo, r.lease} {
		le.PutUint32(c[40+4*i:], v)
	}
}

// decodeAddr returns the record in c; a free one has state 0. It says no when c is neither.
func decodeAddr(c *cell) (r addrRecord, ok bool) {
	for i, v := range []*uint32{&r.chain, &r.prev, &r.next, &r.rangeNo, &r.lease} {
		*v = le.Uint32(c[40+4*i:])
	}
	if le.Uint32(c[0:]) == 0 {
		return r, true
	}
	if le.Uint32(c[0:]) != addrMagic || le.Uint32(c[4:]) != crc32.ChecksumIEEE(c[8:40]) {
		return r, false
	}
	r.addr = addr.From16([16]byte(c[8:24]))
	r.released = time.Duration(le.Uint64(c[24:]))
	r.state = addrState(c[32])
	return r, r.state == leased || r.state == released
}

// rangeRecord is one cell: what a range has leased and what it can lease next.
type rangeRecord struct {
	// cursor is the next address never leased; the zero Addr when there is none left.
	cursor netip.Addr
	// head and tail of the queue of released addresses; head was released first.
	head, tail     uint32
	held, released uint32
	start, end     netip.Addr // for people who look at the file
}

func (r *rangeRecord) encode(c *cell) {
	start, end := addr.As16(r.start), addr.As16(r.end)
	copy(c[0:], start[:])
	copy(c[16:], end[:])
	var cursor [16]byte
	if r.cursor.IsValid() {
		cursor = addr.As16(r.cursor)
	}
	copy(c[32:], cursor[:])
	for i, v := range []uint32{r.head, r.tail, r.held, r.released} {
		le.PutUint32(c[48+4*i:], v)
	}
}

func decodeRange(c *cell) (r rangeRecord) {
	r.start, r.end = addr.From16([16]byte(c[0:16])), addr.From16([16]byte(c[16:32]))
	if cursor := [16]byte(c[32:48]); cursor != [16]byte{} {
		r.cursor = addr.From16(cursor)
	}
	for i, v := range []*uint32{&r.head, &r.tail, &r.held, &r.released} {
		*v = le.Uint32(c[48+4*i:])
	}
	return r
}

// Lease is what one attachment holds.
type Lease struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
	// Netns is the path of the network namespace at ADD.
	Netns string `json:"netns"`
	// PodNamespace and PodName are empty where the runtime knows no pods; very long ones are cut.
	PodNamespace string       `json:"podNamespace,omitempty"`
	PodName      string       `json:"podName,omitempty"`
	Addresses    []netip.Addr `json:"addresses"`
	Time         time.Time    `json:"time"`

	ns nsID
}

// NetnsFile returns device and inode of the file at Netns when the lease was made; zeros where they are not known.
func (l *Lease) NetnsFile() (dev, ino uint64) {
	return l.ns.dev, l.ns.ino
}

// Offsets in a lease record. The chain is outside the CRC because it changes when a neighbour comes or goes.
const (
	leaseChain   = 8
	leaseBody    = 12
	leaseCount   = 36
	leaseLengths = 38
	leaseAddrs   = 48
)

// encode writes the lease; chain is the next record of its bucket. What names the attachment must fit, else the error has code 4.
func (l *Lease) encode(chain uint32) ([leaseSize]byte, error) {
	var b [leaseSize]byte
	le.PutUint32(b[0:], leaseMagic)
	le.PutUint32(b[leaseChain:], chain)
	le.PutUint64(b[12:], uint64(l.Time.UnixNano()))
	le.PutUint64(b[20:], l.ns.dev)
	le.PutUint64(b[28:], l.ns.ino)
	b[leaseCount] = byte(len(l.Addresses))
	at := leaseAddrs
	for _, a := range l.Addresses {
		a16 := addr.As16(a)
		at += copy(b[at:], a16[:])
	}
	for i, s := range []string{l.ContainerID, l.IfName, l.Netns, l.PodNamespace, l.PodName} {
		n := copy(b[at:], s)
		if n < len(s) && i < 3 {
			return b, failf(types.ErrInvalidEnvironmentVariables,
				"CNI_CONTAINERID, CNI_IFNAME and CNI_NETNS are too long: %d bytes, %d are kept", len(l.ContainerID)+len(l.IfName)+len(l.Netns),
				leaseSize-leaseAddrs-16*len(l.Addresses))
		}
		le.PutUint16(b[leaseLengths+2*i:], uint16(n))
		at += n
	}
	le.PutUint32(b[4:], crc32.ChecksumIEEE(b[leaseBody:]))
	return b, nil
}

// decodeLease is the inverse of encode; it says no when b holds no intact lease.
func decodeLease(b []byte) (l Lease, chain uint32, ok bool) {
	if le.Uint32(b[0:]) != leaseMagic || le.Uint32(b[4:]) != crc32.ChecksumIEEE(b[leaseBody:leaseSize]) {
		return l, 0, false
	}
	chain = le.Uint32(b[leaseChain:])
	l.Time = time.Unix(0, int64(le.Uint64(b[12:]))).UTC()
	l.ns = nsID{dev: le.Uint64(b[20:]), ino: le.Uint64(b[28:])}
	n, at := int(b[leaseCount]), leaseAddrs
	if n > maxAddrs {
		return l, 0, false
	}
	for range n {
		l.Addresses = append(l.Addresses, addr.From16([16]byte(b[at:at+16])))
		at += 16
	}
	for i, s := range []*string{&l.ContainerID, &l.IfName, &l.Netns, &l.PodNamespace, &l.PodName} {
		n := int(le.Uint16(b[leaseLengths+2*i:]))
		if at+n > leaseSize {
			return l, 0, false
		}
		*s = string(b[at : at+n])
		at += n
	}
	return l, chain, true
}

func hashAddr(a netip.Addr) uint64 {
	b := addr.As16(a)
	h := fnv.New64a()
	h.Write(b[:])
	return h.Sum64()
}

func hashOwner(containerID, ifName string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(containerID))
	h.Write([]byte{0})
	h.Write([]byte(ifName))
	return h.Sum64()
}
