// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// How soon a server that cannot be reached is tried again.
const (
	redialFirst = 100 * time.Millisecond
	redialMax   = 5 * time.Second
)

// listWatch lists and watches one kind for client-go's reflector, which sees trimmed objects only. It has cache.ListerWatcherWithContext's
// methods. A server that cannot be reached is no error here but a wait: the reflector would take its time to notice that it is back.
type listWatch struct {
	*kind
	source *Source
}

// List implements cache.ListerWatcher.
func (l *listWatch) List(options metav1.ListOptions) (runtime.Object, error) {
	return l.ListWithContext(l.source.ctx, options)
}

// Watch implements cache.ListerWatcher.
func (l *listWatch) Watch(options metav1.ListOptions) (watch.Interface, error) {
	return l.WatchWithContext(l.source.ctx, options)
}

// ListWithContext implements cache.ListerWatcherWithContext. The reflector's pager passes a context that never ends, so the source's counts.
func (l *listWatch) ListWithContext(_ context.Context, options metav1.ListOptions) (out runtime.Object, err error) {
	l.narrow(&options)
	err = l.reach(l.source.ctx, func(ctx context.Context) error {
		var list runtime.Object
		if list, err = l.api.list(ctx, options); err == nil {
			out, err = l.trimList(list)
		}
		return err
	})
	return out, err
}

// WatchWithContext implements cache.ListerWatcherWithContext.
func (l *listWatch) WatchWithContext(ctx context.Context, options metav1.ListOptions) (out watch.Interface, err error) {
	l.narrow(&options)
	var w watch.Interface
	err = l.reach(ctx, func(context.Context) error {
		// The request's context has to last as long as what is watched.
		w, err = l.api.watch(ctx, options)
		return err
	})
	if err != nil {
		return nil, err
	}
	return watch.Filter(w, l.event), nil
}

func (l *listWatch) narrow(options *metav1.ListOptions) {
	options.LabelSelector, options.FieldSelector = l.labels, l.fields
}

// event trims what an event is about.
func (l *listWatch) event(in watch.Event) (watch.Event, bool) {
	if in.Type == watch.Error {
		return in, true
	}
	i, err := l.trim(in.Object, in.Type)
	if err != nil {
		l.source.cfg.Log.Error("an event of the API server is of no use", "kind", l.name, "err", err)
		return in, false
	}
	in.Object = i
	return in, true
}

// reach calls ask until a server answers, whatever it answers, or ctx ends.
func (l *listWatch) reach(ctx context.Context, ask func(context.Context) error) error {
	for delay := redialFirst; ; delay = min(2*delay, redialMax) {
		err := ask(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !unreachable(err) {
			l.source.gate.reached()
			l.note(err)
			return err
		}
		again := l.source.gate.failed(err)
		wait := time.NewTimer(delay/2 + rand.N(delay))
		select {
		case <-ctx.Done():
		case <-again:
		case <-wait.C:
		}
		wait.Stop()
	}
}

// unreachable reports whether nobody answered. What a server answers is an API status.
func unreachable(err error) bool {
	var status apierrors.APIStatus
	return err != nil && !errors.As(err, &status)
}
