// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/margay-cni/margay/internal/testutil/netnstest"
	"github.com/margay-cni/margay/internal/testutil/privileged"
)

// node is a network namespace in which servers listen and clients ask.
type node struct {
	t  *testing.T
	ns *netnstest.NS
}

func newNode(t *testing.T) *node {
	t.Helper()
	privileged.Require(t)
	return &node{t, netnstest.New(t)}
}

// listen is net.Listen inside the namespace.
func (n *node) listen(network, address string) (l net.Listener, err error) {
	n.ns.Do(func() { l, err = net.Listen(network, address) })
	return l, err
}

// occupy takes an address away from everybody else until the result is closed.
func (n *node) occupy(network, address string) net.Listener {
	n.t.Helper()
	l, err := n.listen(network, address)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = l.Close() })
	return l
}

// answer is what a client got; code 0: nobody listens.
type answer struct {
	code   int
	header http.Header
	body   string
}

// ask sends one request from inside the namespace, over a connection of its own.
func (n *node) ask(url string) answer {
	n.t.Helper()
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
			n.ns.Do(func() { c, err = new(net.Dialer).DialContext(ctx, network, address) })
			return c, err
		}}}
	r, err := client.Get(url)
	if err != nil {
		return answer{}
	}
	defer func() { _ = r.Body.Close() }()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		n.t.Fatalf("read the answer of %s: %v", url, err)
	}
	return answer{r.StatusCode, r.Header, string(body)}
}

func quiet() *slog.Logger {
	return slog.New(slog.DiscardHandler)
}

// eventually asks again and again, for at most 10 s.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited 10 s for %s", what)
}
