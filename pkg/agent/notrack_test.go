// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/margay-cni/margay/pkg/link"
	"github.com/margay-cni/margay/pkg/node"
)

// fakeNetfilter is the port whose packets conntrack leaves alone, 0 = none, and how often somebody looked.
type fakeNetfilter struct {
	port  uint16
	looks int
	err   error
}

func (f *fakeNetfilter) EnsureNotrack(port uint16) (changed bool, err error) {
	f.looks++
	if f.err != nil {
		return false, f.err
	}
	changed, f.port = f.port != port, port
	return changed, nil
}

func (f *fakeNetfilter) Remove() (removed bool, err error) {
	f.looks++
	if f.err != nil {
		return false, f.err
	}
	removed, f.port = f.port != 0, 0
	return removed, nil
}

// TestNotrackFollowsTheOverlay: the rules are there as long as an overlay is wanted, at each full round and no more often, and what fails
// is in the status and hinders nothing.
func TestNotrackFollowsTheOverlay(t *testing.T) {
	w, _, _, _ := watchRig(fakeAttacher{})
	rules := &fakeNetfilter{}
	w.rules, w.vxlan = rules, link.VXLAN{Port: 8472}
	overlay := &node.Overlay{}
	failed := errors.New("no such thing")
	for _, step := range []struct {
		name    string
		want    wantedNetwork
		verify  bool
		before  func()
		port    uint16
		looks   int
		problem []string
	}{
		{name: "no other node", verify: true, looks: 1},
		{name: "another node", want: wantedNetwork{overlay: overlay}, verify: true, port: 8472, looks: 2},
		{name: "a change of the network", want: wantedNetwork{overlay: overlay}, port: 8472, looks: 2},
		{name: "somebody took it away", want: wantedNetwork{overlay: overlay}, verify: true, before: func() { rules.port = 0 }, port: 8472, looks: 3},
		{name: "a source that is incomplete", want: wantedNetwork{hold: true}, verify: true, port: 8472, looks: 3},
		{name: "the kernel refuses", want: wantedNetwork{overlay: overlay}, verify: true, before: func() { rules.err = failed }, port: 8472, looks: 4,
			problem: []string{"conntrack rules of the overlay, which a full conntrack table stops without them: no such thing"}},
		{name: "and is not asked meanwhile", want: wantedNetwork{overlay: overlay}, port: 8472, looks: 4,
			problem: []string{"conntrack rules of the overlay, which a full conntrack table stops without them: no such thing"}},
		{name: "it does it again", want: wantedNetwork{overlay: overlay}, verify: true, before: func() { rules.err = nil }, port: 8472, looks: 5},
		{name: "no other node any more", verify: true, looks: 6},
	} {
		if step.before != nil {
			step.before()
		}
		w.want = &step.want
		w.applyNotrack(step.verify)
		if rules.port != step.port || rules.looks != step.looks {
			t.Errorf("%s: port %d after %d looks, want %d after %d", step.name, rules.port, rules.looks, step.port, step.looks)
		}
		if diff := cmp.Diff(step.problem, w.notrackProblems()); diff != "" {
			t.Errorf("%s: problems (-want +got):\n%s", step.name, diff)
		}
	}
}
