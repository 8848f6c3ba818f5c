// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

const (
	agentTimeout = 2 * time.Second
	// agentAnswer bounds what is read of the agent's answer.
	agentAnswer = 1 << 20
)

// agentInfo is what the agent says about itself.
type agentInfo struct {
	Running bool `json:"running"`
	// Status is the answer of GET /status, as the agent gave it.
	Status json.RawMessage `json:"status,omitempty"`
	// Fault says why the status is not known.
	Fault string `json:"fault,omitempty"`
}

// askAgent asks over the agent's socket. No agent is no error: everything else works without.
func askAgent(ctx context.Context, run string) agentInfo {
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(run, "agent.sock"))
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/status", nil)
	if err != nil {
		return agentInfo{Fault: err.Error()}
	}
	response, err := client.Do(request)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return agentInfo{}
	}
	if err != nil {
		return agentInfo{Running: true, Fault: fmt.Sprintf("does not answer: %v", err)}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, agentAnswer))
	if err != nil || response.StatusCode != http.StatusOK || !json.Valid(body) {
		return agentInfo{Running: true, Fault: fmt.Sprintf("gave no status: %s", response.Status)}
	}
	return agentInfo{Running: true, Status: body}
}

// agentStatus is the part of the agent's answer that status shows as text; the whole answer is in its JSON.
type agentStatus struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Ready   bool      `json:"ready"`
	Last    struct {
		Problems []string `json:"problems"`
		Faults   []struct {
			Map   string `json:"map"`
			Error string `json:"error"`
			Cure  string `json:"cure"`
		} `json:"faults"`
		Counts struct {
			Pods     int `json:"pods"`
			Services int `json:"services"`
			Policies int `json:"policies"`
		} `json:"counts"`
		Devices []agentDevice `json:"devices"`
		Overlay *agentDevice  `json:"overlay"`
	} `json:"last"`
	Source []struct {
		File    string `json:"file"`
		Line    int    `json:"line"`
		Object  string `json:"object"`
		Message string `json:"message"`
	} `json:"source"`
	Conditions []struct {
		Subject string `json:"subject"`
		Error   string `json:"error"`
	} `json:"conditions"`
	GC struct {
		Last     time.Time      `json:"last"`
		Suspects int            `json:"suspects"`
		Removed  map[string]int `json:"removed"`
		Error    string         `json:"error"`
	} `json:"gc"`
}

// agentDevice is a device that the agent looks after.
type agentDevice struct {
	Name  string `json:"name"`
	Error string `json:"error"`
}

// text is one line about the agent.
func (i agentInfo) text(now time.Time) string {
	switch {
	case !i.Running && i.Fault == "":
		return "not running; pods start and keep working, but services and policies do not change"
	case i.Fault != "":
		return i.Fault
	}
	var s agentStatus
	if err := json.Unmarshal(i.Status, &s); err != nil {
		return "running"
	}
	parts := []string{"running"}
	if s.Version != "" {
		parts = append(parts, "version "+s.Version)
	}
	if s.PID != 0 {
		parts = append(parts, fmt.Sprintf("pid %d", s.PID))
	}
	if !s.Started.IsZero() {
		parts = append(parts, "for "+span(now.Sub(s.Started)))
	}
	c := s.Last.Counts
	return fmt.Sprintf("%s; pods %d, services %d, policies %d", strings.Join(parts, ", "), c.Pods, c.Services, c.Policies)
}

// garbage is one line about what pods have left on the node; empty where the agent has not looked.
func (i agentInfo) garbage(now time.Time) string {
	var s agentStatus
	if !i.Running || json.Unmarshal(i.Status, &s) != nil || s.GC.Last.IsZero() {
		return ""
	}
	text := "looked " + span(now.Sub(s.GC.Last)) + " ago; removed since the agent started: "
	var kinds []string
	for _, kind := range slices.Sorted(maps.Keys(s.GC.Removed)) {
		kinds = append(kinds, fmt.Sprintf("%s %d", kind, s.GC.Removed[kind]))
	}
	text += cmp.Or(strings.Join(kinds, ", "), "nothing")
	if s.GC.Suspects > 0 {
		text += fmt.Sprintf("; looks dead: %d", s.GC.Suspects)
	}
	return text
}

// problems are what the agent itself reports, and that it does not answer.
func (i agentInfo) problems() []string {
	if i.Fault != "" {
		return []string{"margay-agent " + i.Fault}
	}
	var s agentStatus
	if !i.Running || json.Unmarshal(i.Status, &s) != nil {
		return nil
	}
	var list []string
	if !s.Ready {
		list = append(list, "margay-agent has not read its source yet: services and policies are those of its last run")
	}
	for _, p := range s.Source {
		text := p.File
		if p.Line > 0 {
			text = fmt.Sprintf("%s:%d", p.File, p.Line)
		}
		if p.Object != "" {
			text += ": " + p.Object
		}
		list = append(list, text+": "+p.Message)
	}
	for _, f := range s.Last.Faults {
		text := fmt.Sprintf("map %s: %s", f.Map, f.Error)
		if f.Cure != "" {
			text += "; " + f.Cure
		}
		list = append(list, text)
	}
	for _, c := range s.Conditions {
		list = append(list, c.Subject+": "+c.Error)
	}
	if s.GC.Error != "" {
		list = append(list, "what pods have left cannot be removed entirely: "+strings.ReplaceAll(s.GC.Error, "\n", "; "))
	}
	if s.Last.Overlay != nil {
		s.Last.Devices = append(s.Last.Devices, *s.Last.Overlay)
	}
	for _, d := range s.Last.Devices {
		if d.Error != "" {
			list = append(list, fmt.Sprintf("device %s: %s", d.Name, d.Error))
		}
	}
	return append(list, s.Last.Problems...)
}
