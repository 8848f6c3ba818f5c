// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/pprof"
)

// ProxyMode is the answer of /proxyMode: how services are served, in the manner of kube-proxy's "iptables", "ipvs" and "nftables".
const ProxyMode = "ebpf"

// Introspection is what people and their tools may ask of the agent (row H3).
type Introspection struct {
	// Metrics answers /metrics.
	Metrics http.Handler
	// Config is the answer of /configz, as JSON.
	Config any
	// Profiling adds /debug/pprof/: memory and timing of the process, so only for who is trusted with its address.
	Profiling bool
}

// NewIntrospection returns the handler of /metrics, /healthz, /proxyMode, /configz and, if asked for, /debug/pprof/.
func NewIntrospection(in Introspection) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/metrics", in.Metrics)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { plain(w, "ok") })
	mux.HandleFunc("/proxyMode", func(w http.ResponseWriter, _ *http.Request) { plain(w, ProxyMode) })
	mux.HandleFunc("/configz", func(w http.ResponseWriter, _ *http.Request) {
		body, err := json.MarshalIndent(in.Config, "", "  ")
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(append(body, '\n'))
	})
	if in.Profiling {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	}
	return mux
}

func plain(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = fmt.Fprint(w, text)
}
