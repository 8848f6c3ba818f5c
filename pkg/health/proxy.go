// SPDX-License-Identifier: Apache-2.0

package health

import (
	"encoding/json"
	"net/http"
	"sync"
	"time"
)

// Timeout is how long an update may wait for the maps before the node calls itself unhealthy: twice kube-proxy's sync period (row H2).
const Timeout = 60 * time.Second

// The probes of a Proxy, as they are counted.
const (
	Healthz = "healthz"
	Livez   = "livez"
)

// families are the address families as the answers name them.
var families = []string{"IPv4", "IPv6"}

// Proxy is the health of the node's service proxy. It is healthy until an update has waited for too long, also before the first one: an
// agent that starts finds maps that still serve.
type Proxy struct {
	timeout time.Duration
	count   func(probe string, code int)
	now     func() time.Time

	mu sync.Mutex
	// oldest and newest are when the first and the last update was queued that is not applied; zero: none.
	oldest, newest time.Time
	// updated is when an update was last applied; zero: never.
	updated time.Time
	leaving bool
	// ready says that everything has been in the maps once.
	ready bool
}

// NewProxy returns a healthy one. count is told of each answer; it may be nil.
func NewProxy(count func(probe string, code int)) *Proxy {
	if count == nil {
		count = func(string, int) {}
	}
	return &Proxy{timeout: Timeout, count: count, now: time.Now}
}

// Queued notes that something has changed at that time and is not in the maps yet.
func (p *Proxy) Queued(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.oldest.IsZero() {
		p.oldest = at
	}
	p.newest = at
}

// Applied notes that everything that was queued until then is in the maps. Of what came later the newest counts: the maps keep up with the
// rest, or the next call is missing.
func (p *Proxy) Applied(until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.updated = p.now()
	if p.newest.After(until) {
		p.oldest = p.newest
		return
	}
	p.oldest, p.newest = time.Time{}, time.Time{}
}

// SetLeaving notes whether the node is about to go away: load balancers should send it nothing more.
func (p *Proxy) SetLeaving(leaving bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.leaving = leaving
}

// SetReady notes that the maps hold everything that the cluster wants, without a fault. It stays so: what fails later is no reason to
// count the agent as not there.
func (p *Proxy) SetReady() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready = true
}

// Healthy reports whether the maps keep up with what changes.
func (p *Proxy) Healthy() bool {
	h, _ := p.health()
	return h.Healthy
}

// proxyHealth is the answer; the names are kube-proxy's.
type proxyHealth struct {
	LastUpdated  time.Time `json:"lastUpdated"`
	CurrentTime  time.Time `json:"currentTime"`
	NodeEligible *bool     `json:"nodeEligible,omitempty"`
	Healthy      bool      `json:"healthy"`
	// Status is by family. Margay writes both in one round, so they agree.
	Status map[string]familyHealth `json:"status,omitempty"`
}

type familyHealth struct {
	LastUpdated time.Time `json:"lastUpdated"`
	Healthy     bool      `json:"healthy"`
}

// health returns the answer without the node's part, and whether the node stays.
func (p *Proxy) health() (h proxyHealth, eligible bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	h = proxyHealth{
		LastUpdated: p.updated,
		CurrentTime: now,
		Healthy:     p.oldest.IsZero() || now.Sub(p.oldest) < p.timeout,
		Status:      map[string]familyHealth{},
	}
	if !p.updated.IsZero() {
		for _, f := range families {
			h.Status[f] = familyHealth{LastUpdated: p.updated, Healthy: h.Healthy}
		}
	}
	return h, !p.leaving
}

// Handler answers /healthz, which a leaving node fails, /livez, which it does not: nobody should restart the agent for it, and /readyz, for
// who waits for an agent that has started.
func (p *Proxy) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		h, eligible := p.health()
		h.NodeEligible = &eligible
		p.answer(w, Healthz, h, h.Healthy && eligible)
	})
	mux.HandleFunc("/livez", func(w http.ResponseWriter, _ *http.Request) {
		h, _ := p.health()
		p.answer(w, Livez, h, h.Healthy)
	})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		p.mu.Lock()
		ready := p.ready
		p.mu.Unlock()
		if !ready {
			http.Error(w, "not everything has been read and written yet", http.StatusServiceUnavailable)
			return
		}
		plain(w, "ok")
	})
	return mux
}

func (p *Proxy) answer(w http.ResponseWriter, probe string, h proxyHealth, ok bool) {
	code := http.StatusServiceUnavailable
	if ok {
		code = http.StatusOK
		// kube-proxy once said here when it last looked, not when it last wrote, and probes compare it with the clock.
		h.LastUpdated = h.CurrentTime
	}
	p.count(probe, code)
	body, err := json.Marshal(h)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(body) // the client went away: nobody is left to tell
}
