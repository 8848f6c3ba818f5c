// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// Verdicts of tc programs, linux/pkt_cls.h.
const (
	actOK       = 0
	actShot     = 2
	actRedirect = 7
)

// maxRepeat is how often a packet may go through a program that takes one hop from it each time, and still have hops left.
const maxRepeat = 254

const (
	skbSize    = 192 // struct __sk_buff, linux/bpf.h
	skbIfindex = 40  // offset of its ifindex
)

// testRunAttr is the BPF_PROG_TEST_RUN part of union bpf_attr, linux/bpf.h. The library offers either a context or the duration.
type testRunAttr struct {
	progFD                uint32
	retval                uint32
	sizeIn, sizeOut       uint32
	dataIn, dataOut       uint64
	repeat                uint32
	duration              uint32 // nanoseconds, mean of the repeats
	ctxSizeIn, ctxSizeOut uint32
	ctxIn, ctxOut         uint64
	flags, cpu, batchSize uint32
	_                     uint32
}

// testRun sends the packet, as if it came in on a device, through the program repeat times, and returns the last verdict and the mean
// time of one run in nanoseconds. The kernel does not restore the packet in between: run two gets what run one left.
func testRun(prog *ebpf.Program, packet []byte, ifindex int, repeat uint32) (verdict int, ns float64, err error) {
	var ctx [skbSize]byte
	binary.NativeEndian.PutUint32(ctx[skbIfindex:], uint32(ifindex))
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&packet[0])
	pin.Pin(&ctx[0])
	attr := testRunAttr{
		progFD: uint32(prog.FD()), repeat: repeat,
		dataIn: uint64(uintptr(unsafe.Pointer(&packet[0]))), sizeIn: uint32(len(packet)),
		ctxIn: uint64(uintptr(unsafe.Pointer(&ctx[0]))), ctxSizeIn: skbSize,
	}
	for range 100 { // a signal, such as those of Go's own scheduler, ends a run early
		_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_TEST_RUN, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		if errno == 0 {
			return int(int32(attr.retval)), float64(attr.duration), nil
		}
		if !errors.Is(errno, unix.EINTR) {
			return 0, 0, fmt.Errorf("test run: %w", errno)
		}
	}
	return 0, 0, errors.New("test run: interrupted again and again")
}

// tcpPacket is a TCP segment of one byte, with all the hops a packet can have.
func tcpPacket(srcMAC, dstMAC [6]byte, src, dst netip.AddrPort, syn bool) ([]byte, error) {
	eth := &layers.Ethernet{SrcMAC: net.HardwareAddr(srcMAC[:]), DstMAC: net.HardwareAddr(dstMAC[:]), EthernetType: layers.EthernetTypeIPv4}
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(src.Port()), DstPort: layers.TCPPort(dst.Port()), Seq: 1, Window: 1000, SYN: syn, ACK: !syn,
	}
	var network gopacket.SerializableLayer
	if src.Addr().Is4() {
		ip := &layers.IPv4{
			Version: 4, TTL: 255, Protocol: layers.IPProtocolTCP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice(),
		}
		network = ip
		if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
			return nil, err
		}
	} else {
		ip := &layers.IPv6{
			Version: 6, HopLimit: 255, NextHeader: layers.IPProtocolTCP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice(),
		}
		eth.EthernetType, network = layers.EthernetTypeIPv6, ip
		if err := tcp.SetNetworkLayerForChecksum(ip); err != nil {
			return nil, err
		}
	}
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buf, opts, eth, network, tcp, gopacket.Payload{0}); err != nil {
		return nil, fmt.Errorf("build packet: %w", err)
	}
	return buf.Bytes(), nil
}
