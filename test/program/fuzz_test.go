// SPDX-License-Identifier: Apache-2.0

package program

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/nodetest"
	"github.com/margay-cni/margay/internal/testutil/pkt"
	"github.com/margay-cni/margay/internal/testutil/progtest"
	"github.com/margay-cni/margay/pkg/bpf/object"
)

// FuzzParse sends arbitrary frames through all hooks. Whatever they hold: the action is one that the hook may take, a drop is counted
// once and under a listed reason, nothing else is counted, and a frame whose checksums are right keeps them.
func FuzzParse(f *testing.F) {
	fx := progtest.New(f)
	servicesOn(fx, fx.B)
	for i, v6 := range []bool{false, true} {
		service(fx, uint32(1000*i+1900), at(of(vips, v6), 1)) // no endpoints
		for _, seed := range seeds(fx, v6) {
			f.Add(seed)
		}
	}
	reasons, err := object.DropReasons()
	if err != nil {
		f.Fatal(err)
	}
	var listed []string
	for _, r := range reasons {
		listed = append(listed, object.DropReasonName(r))
	}
	hooks := map[progtest.Hook][]int{
		progtest.FromPod(fx.A): {progtest.OK, progtest.Shot, progtest.Redirect},
		progtest.ToPod(fx.B):   {progtest.OK, progtest.Shot},
		fx.FromNetdev():        {progtest.OK, progtest.Shot, progtest.Redirect},
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) > 2000 {
			t.Skip("longer than any frame")
		}
		for hook, legal := range hooks {
			held := heldEver(t, fx)
			r, err := fx.TryRun(t, hook, frame)
			if errors.Is(err, unix.EINVAL) {
				continue // the kernel refuses to run a program on it
			}
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Contains(legal, r.Action) {
				t.Errorf("%s: action = %d, want one of %v", hook.Program, r.Action, legal)
			}
			checkDrops(t, hook, r, listed, heldEver(t, fx) != held)
			if r.Action != progtest.Shot && pkt.VerifyChecksums(frame) == nil {
				if err := pkt.VerifyChecksums(r.Out); err != nil {
					t.Errorf("%s: out: %v\n%s", hook.Program, err, pkt.Dump(r.Out))
				}
			}
		}
		if t.Failed() {
			t.Log(pkt.Dump(frame))
		}
	})
}

// heldEver tells how many fragments have ever had to wait.
func heldEver(t *testing.T, f *progtest.Fixture) (n uint32) {
	t.Helper()
	must(t, f.Cursor.Lookup(uint32(0), &n))
	return n
}

// checkDrops allows, besides the one reason of the packet itself, those of fragments that waited before it; one that waits itself is taken
// from the stack without being dropped.
func checkDrops(t *testing.T, hook progtest.Hook, r progtest.Result, listed []string, held bool) {
	t.Helper()
	delete(r.Drops, "fragment_lost")
	total := uint64(0)
	for reason, n := range r.Drops {
		total += n
		if !slices.Contains(listed, reason) {
			t.Errorf("%s: drop reason %s is not listed", hook.Program, reason)
		}
	}
	switch {
	case r.Action == progtest.Shot && held && total == 0:
	case r.Action == progtest.Shot && total != 1:
		t.Errorf("%s: dropped, and counted as %v, want one reason once", hook.Program, r.Drops)
	case r.Action == progtest.Redirect && total == 1 && r.Drops["service_no_backend"]+r.Drops["too_big"] == 1: // answered
	case r.Action != progtest.Shot && total != 0:
		t.Errorf("%s: not dropped (action %d), but counted as %v", hook.Program, r.Action, r.Drops)
	}
}

// seeds are valid frames of every kind, and the malformed ones of the other tests.
func seeds(f *progtest.Fixture, v6 bool) (frames [][]byte) {
	for _, kind := range []pkt.Kind{pkt.TCP, pkt.UDP, pkt.SCTP, pkt.Ping, pkt.Pong} {
		for _, open := range []pkt.Packet{
			fromPod(f.A, kind, at(f.B.Addr(v6), podPort)),
			fromPod(f.A, kind, at(of(vips, v6), vipPort)),
			fromPod(f.A, kind, at(of(vips, v6), 1)),
			fromPod(f.A, kind, at(of(nodetest.ClientAddrs, v6), 443)),
			fromClient(kind, at(of(nodetest.NodeAddrs, v6), nodePort)),
			fromClient(kind, at(f.B.Addr(v6), podPort)),
		} {
			frame := open.Bytes()
			frames = append(frames, frame, data(open).Bytes(), pkt.WithOptions(frame, 0), quotePort(open, open.Dst.Addr(), open.SrcMAC, open.DstMAC))
			parts, late := pkt.Fragment(large(open).Bytes(), 1, piece), pkt.Fragment(large(open).Bytes(), 2, piece)
			frames = append(frames, parts[0], parts[1], late[1], late[0], pkt.WithOptions(parts[0], 60), pkt.WithOptions(frame, 51))
			// What the opener says of its answers: a service's are translated.
			for form := range quoting {
				e := sent(with(open, open.Dst, open.Src), open.Src.Addr())
				e.srcMAC, e.dstMAC = open.SrcMAC, open.DstMAC
				frames = append(frames, e.frame(form))
			}
			frames = append(frames, ofLength(open, 1501).Bytes())
		}
	}
	valid := fromPod(f.A, pkt.TCP, at(f.B.Addr(v6), podPort))
	for _, m := range malformed(v6) {
		frames = append(frames, m.frame(valid))
	}
	if v6 {
		return append(frames, pkt.Solicitation(f.A.MAC, f.A.Addr(v6), f.B.Addr(v6), true),
			pkt.Advertisement(f.A.MAC, f.A.Addr(v6), f.A.HostMAC, nodetest.NodeAddrs[1]), pkt.RouterSolicitation(f.A.MAC, f.A.Addr(v6)))
	}
	return append(frames, pkt.ARPRequest(f.A.MAC, f.A.Addr(v6), f.B.Addr(v6)),
		pkt.ARPReply(f.A.MAC, f.A.Addr(v6), f.A.HostMAC, nodetest.NodeAddrs[0]))
}
