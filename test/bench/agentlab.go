// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/margay-cni/margay/internal/testutil/apitest"
	"github.com/margay-cni/margay/pkg/bpf"
	"github.com/margay-cni/margay/pkg/datapath"
	"github.com/margay-cni/margay/pkg/netns"
)

// agentLab is a node for an agent alone: a namespace without other devices, an API server in this process, maps of the default sizes.
type agentLab struct {
	bench   *bench
	dir     string
	node    *clusterNode
	fixture *fixture
	api     *apitest.Server

	// Of the agent that runs: its maps, when it was started, and when it said that it had read everything.
	daemon        *daemon
	dp            *datapath.Datapath
	bpffs         string
	started, read time.Time
}

func (b *bench) newAgentLab(name string) (*agentLab, error) {
	l := &agentLab{bench: b, dir: filepath.Join(b.node.dir, "agent-"+name)}
	if err := os.Mkdir(l.dir, 0o755); err != nil {
		return nil, err
	}
	path, err := b.node.namespace("agent-" + name)
	if err != nil {
		return nil, err
	}
	l.node, l.fixture = &clusterNode{place: place{path: path}, name: nodeName(0)}, &fixture{dir: l.dir}
	return l, netns.Do(path, func() error {
		l.api = apitest.New(l.fixture)
		return nil
	})
}

func (l *agentLab) close() {
	l.stop()
	l.fixture.close()
}

func (l *agentLab) fromServer() []string {
	return []string{"--kubeconfig", l.api.Kubeconfig(), "--state-dir", ""}
}

// startWith runs an agent over new maps, which are made before so that they can be watched from the first write on.
func (l *agentLab) startWith(ctx context.Context, name string, source ...string) (err error) {
	dir := filepath.Join(l.dir, name)
	l.bpffs = filepath.Join(dir, "bpf")
	run := filepath.Join(dir, "run")
	if err := os.MkdirAll(run, 0o755); err != nil {
		return err
	}
	err = netns.Do(l.node.path, func() error {
		l.dp, err = datapath.Ensure(ctx, datapath.Config{BPFFS: l.bpffs, Run: run})
		return err
	})
	if err != nil {
		return err
	}
	argv := append([]string{filepath.Join(l.bench.node.bin, "margay-agent"), "--node", l.node.name, "--bpffs", l.bpffs, "--run", run}, source...)
	l.read, l.started = time.Time{}, time.Now()
	l.daemon, err = startDaemon(l.node, filepath.Join(dir, "log"), argv)
	return err
}

// stop ends the agent and its maps.
func (l *agentLab) stop() {
	if l.daemon != nil {
		l.daemon.stop()
	}
	if l.dp != nil {
		_ = l.dp.Close()
		_ = unix.Unmount(l.bpffs, unix.MNT_DETACH) // else it ends with the run
	}
	l.daemon, l.dp = nil, nil
}

// late is the error when something does not happen in time.
func (l *agentLab) late(what string) error {
	return fmt.Errorf("%s after %v: %s", what, patience, l.daemon.lastWords())
}

// untilWritten waits until the service maps hold so many frontends and backends. It returns when it saw the first entry and when the last.
func (l *agentLab) untilWritten(frontends, backends int) (first, last time.Time, err error) {
	maps := &l.dp.Maps
	steps := []func() (bool, error){
		func() (bool, error) { return l.hasRead(), nil },
		func() (bool, error) {
			var key bpf.ServiceBackend
			if first.IsZero() && maps.ServiceBackends.NextKey(nil, &key) == nil {
				first = time.Now()
			}
			return !first.IsZero(), nil
		},
		// In about this order they are written; counting takes time.
		func() (bool, error) { return holds[bpf.ServiceBackend, uint32](maps.ServiceBackends, backends) },
		func() (bool, error) { return holds[bpf.BackendKey, bpf.Backend](maps.Backends, backends) },
		func() (bool, error) { return holds[bpf.FrontendKey, bpf.Service](maps.Services, frontends) },
	}
	for end := l.started.Add(patience); len(steps) > 0; {
		done, err := steps[0]()
		switch {
		case err != nil:
			return first, last, err
		case done:
			steps = steps[1:]
		case time.Now().After(end):
			return first, last, l.late("the maps are not written")
		default:
			time.Sleep(500 * time.Microsecond)
		}
	}
	return first, time.Now(), nil
}

// hasRead looks for the line in which an agent says that it has read everything. One that reads manifests does not say so.
func (l *agentLab) hasRead() bool {
	text, err := os.ReadFile(l.daemon.log)
	if err != nil || !bytes.Contains(text, []byte("everything has been read")) {
		return bytes.Contains(text, []byte("/manifests"))
	}
	l.read = time.Now()
	return true
}

// holds reports whether a map has so many entries.
func holds[K, V any](m *ebpf.Map, want int) (bool, error) {
	keys, values := make([]K, 8192), make([]V, 8192)
	var cursor ebpf.MapBatchCursor
	for n := 0; ; {
		got, err := m.BatchLookup(&cursor, keys, values, nil)
		n += got
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return n >= want, nil
		case err != nil:
			return false, fmt.Errorf("count the entries of %s: %w", m, err)
		}
	}
}

// change gives a service one endpoint more, or the usual number again, and returns after what time the maps say so: the frontend counts
// the new one, which is in the set of those that serve, or neither.
func (l *agentLab) change(service, endpoints int, add bool, put func(service, endpoints int) error) (time.Duration, error) {
	frontend := bpf.NewFrontendKey(unix.IPPROTO_TCP, serviceAddr(service), servicePort)
	var now bpf.Service
	if err := l.dp.Maps.Services.Lookup(&frontend, &now); err != nil {
		return 0, err
	}
	member := bpf.NewServiceBackend(now.Id, netip.AddrPortFrom(endpointAddr(service, endpoints), targetPort))
	want := uint32(endpoints)
	if add {
		want++
	}
	began := time.Now()
	if err := put(service, int(want)); err != nil {
		return 0, err
	}
	for ; ; time.Sleep(100 * time.Microsecond) { // without a pause the agent would have one CPU less
		if err := l.dp.Maps.Services.Lookup(&frontend, &now); err != nil {
			return 0, err
		}
		var flags uint32
		serves := l.dp.Maps.ServiceBackends.Lookup(&member, &flags) == nil
		took := time.Since(began)
		if now.Count == [2]uint32{want, want} && serves == add {
			return took, nil
		}
		if took > patience {
			return 0, l.late(fmt.Sprintf("service %d has %d endpoints in the maps, want %d", service, now.Count, want))
		}
	}
}

// resident is what the agent's process holds in memory, in MiB: Rss and Pss with what is mapped of its file, Anonymous without.
func (l *agentLab) resident() (map[string]float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", l.daemon.cmd.Process.Pid))
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if name != "Rss" && name != "Pss" && name != "Anonymous" {
			continue
		}
		kib, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		if err != nil {
			return nil, err
		}
		out[name] = kib / 1024
	}
	return out, nil
}

// mapSizes is what the kernel accounts for each pinned map, in MiB.
func mapSizes(dir string) (map[string]float64, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for _, f := range files {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, f.Name()), &ebpf.LoadPinOptions{ReadOnly: true})
		if err != nil {
			return nil, err
		}
		info, err := m.Info()
		if err := errors.Join(err, m.Close()); err != nil {
			return nil, err
		}
		bytes, _ := info.Memlock() // a trie without entries takes nothing
		out[f.Name()] = float64(bytes) / (1 << 20)
	}
	return out, nil
}
