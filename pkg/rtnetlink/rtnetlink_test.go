// SPDX-License-Identifier: Apache-2.0

package rtnetlink

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

type attribute struct {
	Kind  uint16
	Value string
}

func attributes(b []byte) (out []attribute) {
	for kind, value := range Attributes(b) {
		out = append(out, attribute{kind, string(value)})
	}
	return out
}

func TestRequest(t *testing.T) {
	r := NewRequest(unix.RTM_NEWLINK, unix.NLM_F_EXCL, []byte{1, 2, 3, 4})
	r.String(5, "ab")
	r.Nest(6, func() {
		r.Raw([]byte{9})
		r.Bytes(7, []byte{8})
	})
	r.Bytes(8, nil)
	if kind, flags := native.Uint16(r.data[4:]), native.Uint16(r.data[6:]); kind != unix.RTM_NEWLINK || flags != unix.NLM_F_EXCL|unix.NLM_F_REQUEST {
		t.Errorf("kind %d and flags %#x, want %d and %#x", kind, flags, unix.RTM_NEWLINK, unix.NLM_F_EXCL|unix.NLM_F_REQUEST)
	}
	if diff := cmp.Diff([]byte{1, 2, 3, 4}, r.data[16:20]); diff != "" {
		t.Errorf("fixed part (-want +got):\n%s", diff)
	}
	got := attributes(r.data[20:])
	nested := attributes([]byte(got[1].Value[4:]))
	if diff := cmp.Diff([]attribute{{7, "\x08"}}, nested); diff != "" {
		t.Errorf("nested (-want +got):\n%s", diff)
	}
	got[1].Value = got[1].Value[:4]
	if diff := cmp.Diff([]attribute{{5, "ab\x00"}, {6, "\x09\x00\x00\x00"}, {8, ""}}, got); diff != "" {
		t.Errorf("attributes (-want +got):\n%s", diff)
	}
}

// FuzzAttributes wants an end and no panic, whatever the message.
func FuzzAttributes(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{5, 0, 1, 0, 9})
	f.Add([]byte{255, 255, 1, 0, 9, 9, 9, 9})
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		for _, value := range Attributes(b) {
			total += unix.SizeofRtAttr + len(value)
		}
		if total > len(b) {
			t.Errorf("%d bytes of attributes in %d", total, len(b))
		}
	})
}

func TestSocketIsInItsNamespace(t *testing.T) {
	privileged.Require(t)
	ns := netnstest.New(t)
	dir, err := unix.Open(ns.Path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()

	bridge := NewRequest(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, make([]byte, unix.SizeofIfInfomsg))
	bridge.String(unix.IFLA_IFNAME, "rtnl0")
	bridge.Nest(unix.IFLA_LINKINFO, func() { bridge.String(unix.IFLA_INFO_KIND, "bridge") })
	if err := s.Do(bridge); err != nil {
		t.Fatal(err)
	}
	if err := s.Do(bridge); !errors.Is(err, unix.EEXIST) {
		t.Errorf("second time: %v, want EEXIST", err)
	}
	question := NewRequest(unix.RTM_GETLINK, 0, make([]byte, unix.SizeofIfInfomsg))
	question.String(unix.IFLA_IFNAME, "rtnl0")
	if b, err := s.Get(question); err != nil || len(b) < unix.SizeofIfInfomsg {
		t.Errorf("Get() = %d bytes, %v", len(b), err)
	}
	here, err := Open(-1)
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if _, err := here.Get(question); !errors.Is(err, unix.ENODEV) {
		t.Errorf("in the test's own namespace: %v, want ENODEV", err)
	}
	if _, err := s.Get(bridge); !errors.Is(err, unix.EEXIST) {
		t.Errorf("Get() of a command: %v, want EEXIST", err)
	}
	if _, err := Open(1 << 20); !errors.Is(err, unix.EBADF) {
		t.Errorf("Open() of no namespace: %v, want EBADF", err)
	}
}
