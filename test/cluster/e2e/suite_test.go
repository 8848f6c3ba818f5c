// SPDX-License-Identifier: Apache-2.0

//go:build cluster

package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/margay-cni/margay/test/cluster/lab"
)

var (
	dirFlag    = flag.String("dir", "../../../build/cluster", "what was built, and the clusters' state")
	nameFlag   = flag.String("cluster", "", "the name of the cluster to use")
	upFlag     = flag.Bool("up", false, "make the cluster (its name is e2e if -cluster does not say so), and end it afterwards")
	nodesFlag  = flag.Int("nodes", 2, "with -up: how many nodes")
	familyFlag = flag.String("family", string(lab.Dual), "with -up: dual, ipv4 or ipv6")
	cniFlag    = flag.String("cni", "margay", "with -up: the network, margay or reference")
	keepFlag   = flag.Bool("keep", false, "with -up: leave the cluster up if a test failed")
)

// cluster is the one that all tests use, and api its API server.
var (
	cluster *lab.Cluster
	api     *apiServer
)

func TestMain(m *testing.M) {
	flag.Parse()
	if *nameFlag == "" && !*upFlag {
		fmt.Fprintln(os.Stderr, "test/cluster/e2e: no cluster is given: make test-cluster, or add -cluster NAME or -up")
		os.Exit(1)
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "test/cluster/e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if *nameFlag == "" {
		*nameFlag = "e2e"
	}
	if *upFlag {
		defer func() {
			if *keepFlag && code != 0 {
				return
			}
			err = errors.Join(err, lab.Down(*dirFlag, *nameFlag))
		}()
		if err := makeCluster(); err != nil {
			return 1, err
		}
	} else if cluster, err = lab.Open(*dirFlag, *nameFlag); err != nil {
		return 1, err
	}
	if api, err = connect(cluster); err != nil {
		return 1, err
	}
	code = m.Run()
	return code, removeSpaces()
}

// makeCluster starts the cluster, and waits for what Up does not wait for: Up leaves a cluster without its network if there is no image.
func makeCluster() (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	o := lab.Options{Dir: *dirFlag, Name: *nameFlag, Nodes: *nodesFlag, Family: lab.Family(*familyFlag), CNI: *cniFlag}
	if cluster, err = lab.Up(ctx, o, slog.New(slog.NewTextHandler(os.Stderr, nil))); err != nil {
		return err
	}
	return cluster.WaitReady(ctx)
}

// onMargay reports whether the cluster's network is Margay. The reference network has no policy and hides the client's address; what
// does not depend on that must work there too, which shows that the test is right.
func onMargay() bool { return cluster.CNI == "margay" }

// needMargay skips a test of what the reference network has not.
func needMargay(t *testing.T, what string) {
	t.Helper()
	if !onMargay() {
		t.Skipf("the cluster's network is %s, which has no %s", cluster.CNI, what)
	}
}
