// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

const (
	// statusSpread is within which time of a change the nodes look, each at a random moment: the first one writes, the others find it done.
	statusSpread = 5 * time.Second
	// statusRetry is when what could not be written is tried again.
	statusRetry = 30 * time.Second
	// fieldManager owns the condition in server-side apply; all nodes are one.
	fieldManager = "margay"
)

// Statuses writes what became of ClusterNetworkPolicies into their status (contract row C9). All nodes come to the same conditions and
// write them by server-side apply, so that it does not matter which one does; other writers' conditions stay.
type Statuses struct {
	source *Source
	client rest.Interface
	spread time.Duration

	mu     sync.Mutex
	wanted map[string]metav1.Condition
	wake   chan struct{}
}

// Statuses returns where to say what became of policies; it is written until ctx ends.
func (s *Source) Statuses(ctx context.Context) (*Statuses, error) {
	c, err := s.client.rest(policyGroup, runtime.ContentTypeJSON)
	if err != nil {
		return nil, err
	}
	w := &Statuses{source: s, client: c, spread: statusSpread, wake: make(chan struct{}, 1)}
	go w.deliver(ctx)
	return w, nil
}

// ClusterPolicies takes the conditions of all policies, by name. It does not block, and keeps the map, which must not change any more.
func (w *Statuses) ClusterPolicies(conditions map[string]metav1.Condition) {
	w.mu.Lock()
	w.wanted = conditions
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// deliver looks at a policy's status when its condition is another one than when it was last looked at.
func (w *Statuses) deliver(ctx context.Context) {
	done := map[string]metav1.Condition{}
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-retry.C:
		case <-w.wake:
			if w.changed(done) && !sleep(ctx, rand.N(w.spread)) {
				return
			}
		}
		w.mu.Lock()
		wanted := w.wanted
		w.mu.Unlock()
		maps.DeleteFunc(done, func(name string, _ metav1.Condition) bool { _, there := wanted[name]; return !there })
		for name, c := range wanted {
			if done[name] == c {
				continue
			}
			if err := w.write(ctx, name, c); err != nil {
				if ctx.Err() != nil {
					return
				}
				w.source.cfg.Log.Warn("a policy's status could not be written; trying again", "policy", name, "err", err)
				retry.Reset(statusRetry)
				continue
			}
			done[name] = c
		}
	}
}

func (w *Statuses) changed(done map[string]metav1.Condition) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, c := range w.wanted {
		if done[name] != c {
			return true
		}
	}
	return false
}

// write brings one policy's condition to what is wanted, if it is not. A policy that is gone needs none.
func (w *Statuses) write(ctx context.Context, name string, want metav1.Condition) error {
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	data, err := w.client.Get().Resource(clusterPolicies).Name(name).Do(ctx).Raw()
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read ClusterNetworkPolicy %s: %w", name, err)
	}
	var have struct {
		Status struct {
			Conditions []metav1.Condition `json:"conditions"`
		} `json:"status"`
	}
	if err := json.Unmarshal(data, &have); err != nil {
		return fmt.Errorf("decode ClusterNetworkPolicy %s: %w", name, err)
	}
	want.LastTransitionTime = metav1.Now().Rfc3339Copy()
	if old := meta.FindStatusCondition(have.Status.Conditions, want.Type); old != nil {
		if old.Status == want.Status {
			want.LastTransitionTime = old.LastTransitionTime
		}
		// A node that has seen a later generation knows better.
		if *old == want || old.ObservedGeneration > want.ObservedGeneration {
			return nil
		}
	}
	patch, err := json.Marshal(map[string]any{
		"apiVersion": policyGroup.String(), "kind": "ClusterNetworkPolicy", "metadata": map[string]any{"name": name},
		"status": map[string]any{"conditions": []metav1.Condition{want}},
	})
	if err != nil {
		return err
	}
	err = w.client.Patch(types.ApplyPatchType).Resource(clusterPolicies).Name(name).SubResource("status").
		Param("fieldManager", fieldManager).Param("force", "true").Body(patch).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("write the status of ClusterNetworkPolicy %s: %w", name, err)
	}
	return nil
}
