// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/flow"
)

// nearlyFull is the fill level, in percent, from which a map is reported. The flow table evicts its oldest entries and may be full.
const nearlyFull = 90

// buildInfo is one set of pinned programs.
type buildInfo struct {
	Build    string   `json:"build"`
	Programs []string `json:"programs"`
}

// mapInfo is one pinned map. Entries is absent for arrays, whose elements all exist, and for the ring buffer.
type mapInfo struct {
	Name     string `json:"name"`
	Pin      string `json:"pin"`
	Type     string `json:"type"`
	Entries  *int   `json:"entries,omitempty"`
	Capacity uint32 `json:"capacity"`
	// MemoryBytes is what the kernel accounts for the map.
	MemoryBytes uint64 `json:"memoryBytes"`
}

// deviceInfo is one device and whether Margay's programs are on it.
type deviceInfo struct {
	Device  string `json:"device"`
	Ifindex int    `json:"ifindex"`
	// Kind is "pod" for a pod's host-side device, "node" for one that leads out of the node, "overlay" for the one that leads to others.
	Kind     string `json:"kind"`
	Pod      string `json:"pod,omitempty"`
	Attached bool   `json:"attached"`
	// Programs are those of this build that belong on it.
	Programs []string `json:"programs,omitempty"`
	// TCX: the agent has attached them by tcx links as well, which run before the filters.
	TCX bool `json:"tcx,omitempty"`
	// Fault says why Attached is false.
	Fault string `json:"fault,omitempty"`
}

// nodeStatus is everything that status shows.
type nodeStatus struct {
	// Loaded: maps are pinned.
	Loaded   bool         `json:"loaded"`
	BPFFS    string       `json:"bpffs"`
	Run      string       `json:"run"`
	Programs []buildInfo  `json:"programs"`
	Maps     []mapInfo    `json:"maps"`
	Devices  []deviceInfo `json:"devices"`
	Agent    agentInfo    `json:"agent"`
	Problems []string     `json:"problems"`

	now time.Time
}

func newStatus(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show whether Margay works on this node: pins, maps, devices, agent, problems",
		Long: "Show whether Margay works on this node: pins, maps, devices, agent, problems.\n" +
			"The exit status is 0 when the datapath is loaded, with or without problems or agent, and 1 when it is not.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s := a.source()
			defer s.close()
			status, err := a.collectStatus(cmd.Context(), s)
			if err != nil {
				return err
			}
			if err := a.show(status); err != nil {
				return err
			}
			if !status.Loaded {
				return errShown
			}
			return nil
		},
	}
}

func (a *app) collectStatus(ctx context.Context, s *source) (*nodeStatus, error) {
	st := &nodeStatus{
		Loaded: s.loaded(), BPFFS: a.node.BPFFS, Run: a.node.Run, Agent: askAgent(ctx, a.node.Run), now: time.Now(),
		Programs: []buildInfo{}, Maps: []mapInfo{}, Devices: []deviceInfo{}, Problems: []string{},
	}
	st.Problems = append(st.Problems, st.Agent.problems()...)
	if !st.Loaded {
		st.problem("%v", s.notLoaded())
		return st, nil
	}
	var err error
	if st.Programs, err = listBuilds(filepath.Join(a.node.BPFFS, "progs")); err != nil {
		return nil, err
	}
	if len(st.Programs) == 0 {
		st.problem("no programs are pinned under %s/progs: pods cannot be connected; start margay-agent", a.node.BPFFS)
	}
	if st.Maps, err = s.listMaps(); err != nil {
		return nil, err
	}
	for _, m := range st.Maps {
		if text := m.fillProblem(); text != "" {
			st.problem("%s", text)
		}
	}
	return st, a.collectDevices(s, st)
}

func (st *nodeStatus) problem(format string, args ...any) {
	st.Problems = append(st.Problems, fmt.Sprintf(format, args...))
}

// collectDevices compares endpoints, records and devices.
func (a *app) collectDevices(s *source, st *nodeStatus) error {
	m, err := s.openMap("endpoints")
	if err != nil {
		st.problem("%v", err)
		return nil
	}
	devs, err := listDevices()
	if err != nil {
		return err
	}
	endpoints, err := collectEndpoints(m, a.names(), devs)
	if err != nil {
		return err
	}
	d, err := openDatapath(a.node)
	if err != nil {
		st.problem("%v", err)
		st.addDevices(endpoints, devs, nil)
		return nil
	}
	defer d.Close()
	st.addDevices(endpoints, devs, opened{d})
	return nil
}

// kindPrograms are the programs on a device of the kinds that have always the same, ingress before egress.
var kindPrograms = map[string][]string{
	"pod":     {bpf.ProgFromPod, bpf.ProgToPod},
	"overlay": {bpf.ProgFromOverlay, bpf.ProgToOverlay},
}

// addDevices lists the pods' devices, with what is wrong about them, and the node's devices that carry programs. Without at nothing is
// known of programs.
func (st *nodeStatus) addDevices(endpoints []endpointInfo, devs devices, at attachments) {
	pods := map[int]bool{}
	for _, e := range endpoints {
		pods[e.Ifindex] = true
		d := deviceInfo{Device: e.Device, Ifindex: e.Ifindex, Kind: "pod", Pod: e.Pod}
		who := cmp.Or(e.Pod, e.Addresses[0].Address.String())
		switch _, there := devs[e.Ifindex]; {
		case !there:
			d.Fault = "the device is gone"
			st.problem("%s: its device is gone; the runtime has not called DEL, margay-agent removes what is left of it", who)
		case slices.Contains(e.Flags, markUnregistered):
			d.Fault = "not registered"
			st.problem("%s: has a record but is not in the map endpoints; start margay-agent", who)
		case at == nil:
			d.Fault = "not known"
		default:
			if err := at.PodAttached(e.Ifindex); err != nil {
				d.Fault = err.Error()
				st.problem("%s: %v; start margay-agent, which attaches it again", who, err)
			}
		}
		if slices.Contains(e.Flags, markNoRecord) {
			st.problem("%s: in the map endpoints without a record; start margay-agent, which removes it", who)
		}
		d.Attached = d.Fault == ""
		st.Devices = append(st.Devices, d)
	}
	for ifindex, name := range devs {
		d := deviceInfo{Device: name, Ifindex: ifindex, Attached: true}
		switch {
		case at == nil || pods[ifindex]:
			continue
		case at.NetdevAttached(ifindex) == nil:
			d.Kind, d.Programs = "node", at.NetdevPrograms(ifindex)
		case at.OverlayAttached(ifindex) == nil:
			d.Kind = "overlay"
		default:
			continue
		}
		st.Devices = append(st.Devices, d)
	}
	for i := range st.Devices {
		d := &st.Devices[i]
		if d.Attached && d.Programs == nil {
			d.Programs = kindPrograms[d.Kind]
		}
		d.TCX = at != nil && d.Attached && d.Kind != "pod" && at.Linked(d.Ifindex, d.Programs...)
	}
	slices.SortFunc(st.Devices, func(a, b deviceInfo) int {
		return cmp.Or(strings.Compare(a.Kind, b.Kind), strings.Compare(a.Device, b.Device), cmp.Compare(a.Ifindex, b.Ifindex))
	})
}

// listBuilds lists the pinned programs; a missing directory holds none.
func listBuilds(dir string) ([]buildInfo, error) {
	dirs, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list pinned programs: %w", err)
	}
	builds := []buildInfo{}
	for _, d := range dirs {
		if strings.HasSuffix(d.Name(), "-partial") {
			continue // a load that was interrupted; the next one removes it
		}
		pins, err := os.ReadDir(filepath.Join(dir, d.Name()))
		if err != nil {
			return nil, fmt.Errorf("list pinned programs: %w", err)
		}
		b := buildInfo{Build: d.Name(), Programs: []string{}}
		for _, p := range pins {
			b.Programs = append(b.Programs, p.Name())
		}
		builds = append(builds, b)
	}
	return builds, nil
}

// listMaps describes every pinned map, also those of another build.
func (s *source) listMaps() ([]mapInfo, error) {
	pins, err := os.ReadDir(s.mapDir())
	if err != nil {
		return nil, fmt.Errorf("list pinned maps: %w", err)
	}
	maps := []mapInfo{}
	for _, pin := range pins {
		m, err := ebpf.LoadPinnedMap(filepath.Join(s.mapDir(), pin.Name()), nil)
		if err != nil {
			return nil, fmt.Errorf("open pinned map %s: %w", pin.Name(), err)
		}
		s.open = append(s.open, m)
		info, err := newMapInfo(pin.Name(), m)
		if err != nil {
			return nil, err
		}
		maps = append(maps, info)
	}
	return maps, nil
}

func newMapInfo(pin string, m *ebpf.Map) (mapInfo, error) {
	name, _, _ := strings.Cut(pin, "_v")
	out := mapInfo{Name: name, Pin: pin, Type: m.Type().String(), Capacity: m.MaxEntries()}
	info, err := m.Info()
	if err != nil {
		return out, fmt.Errorf("describe map %s: %w", name, err)
	}
	out.MemoryBytes, _ = info.Memlock()
	switch m.Type() {
	case ebpf.Hash, ebpf.LRUHash, ebpf.LPMTrie:
		n, err := flow.Count(m)
		if err != nil {
			return out, err
		}
		out.Entries = &n
	}
	return out, nil
}

// percent is the fill level; 0 where it has no meaning.
func (m mapInfo) percent() int {
	if m.Entries == nil || m.Capacity == 0 {
		return 0
	}
	return int(uint64(*m.Entries) * 100 / uint64(m.Capacity))
}

// fillProblem says that the map has little room left, and what its size is set by; "" while it has.
func (m mapInfo) fillProblem() string {
	if m.percent() < nearlyFull || m.Type == ebpf.LRUHash.String() {
		return ""
	}
	return fmt.Sprintf("map %s is %d %% full: its size is margay-agent's --map-size %s=N, which takes effect when the maps are made anew",
		m.Name, m.percent(), m.Name)
}

func (st *nodeStatus) print(w io.Writer) {
	datapath := "not loaded"
	if st.Loaded {
		datapath = "loaded under " + st.BPFFS
	}
	fmt.Fprintf(w, "datapath  %s\n", datapath)
	for _, b := range st.Programs {
		fmt.Fprintf(w, "programs  %s (build %s)\n", strings.Join(b.Programs, ", "), b.Build)
	}
	fmt.Fprintf(w, "agent     %s\n", st.Agent.text(st.now))
	if text := st.Agent.garbage(st.now); text != "" {
		fmt.Fprintf(w, "gc        %s\n", text)
	}
	if len(st.Problems) == 0 {
		fmt.Fprintln(w, "problems  none")
	}
	for i, p := range st.Problems {
		fmt.Fprintf(w, "%s  %s\n", pad([]string{"problems", ""}[min(i, 1)], 8, false), p)
	}
	st.printMaps(w)
	st.printDevices(w)
}

func (st *nodeStatus) printMaps(w io.Writer) {
	if len(st.Maps) == 0 {
		return
	}
	fmt.Fprintln(w)
	t := newTable("MAP", "TYPE", ">ENTRIES", ">CAPACITY", ">USED", ">MEMORY")
	for _, m := range st.Maps {
		entries, used := "-", "-"
		if m.Entries != nil {
			entries, used = fmt.Sprint(*m.Entries), fmt.Sprintf("%d %%", m.percent())
		}
		t.add(m.Name, m.Type, entries, fmt.Sprint(m.Capacity), used, size(m.MemoryBytes))
	}
	t.print(w)
}

func (st *nodeStatus) printDevices(w io.Writer) {
	if len(st.Devices) == 0 {
		return
	}
	fmt.Fprintln(w)
	t := newTable("DEVICE", "KIND", "POD", "PROGRAMS")
	for _, d := range st.Devices {
		programs := strings.Join(d.Programs, ", ")
		if d.TCX {
			programs += " (tcx)"
		}
		t.add(d.Device, d.Kind, dash(d.Pod), cmp.Or(d.Fault, programs))
	}
	t.print(w)
}
