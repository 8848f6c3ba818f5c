// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/margay-cni/margay/pkg/state"
)

const (
	// component is who events are from.
	component = "margay-agent"
	// queuedEvents is how many may wait; eventTries how often one is tried, eventRetry after what time.
	queuedEvents = 100
	eventTries   = 12
	eventRetry   = 10 * time.Second
	eventTimeout = 10 * time.Second
)

// Events writes events about this node and about services. It neither blocks nor fails: what cannot be delivered for two minutes is lost,
// and so is what comes when too many wait. Who sends decides what is worth an event: nothing is counted or joined here.
type Events struct {
	source *Source
	client rest.Interface
	queue  chan *corev1.Event
}

// Events returns where to send events; they are delivered until ctx ends.
func (s *Source) Events(ctx context.Context) (*Events, error) {
	c, err := s.client.rest(corev1.SchemeGroupVersion, runtime.ContentTypeProtobuf)
	if err != nil {
		return nil, err
	}
	e := &Events{source: s, client: c, queue: make(chan *corev1.Event, queuedEvents)}
	go e.deliver(ctx)
	return e, nil
}

// Node writes an event about this node: a warning, or that one is over.
func (e *Events) Node(warning bool, reason, message string) {
	kind := corev1.EventTypeNormal
	if warning {
		kind = corev1.EventTypeWarning
	}
	// Kubelet's events have the name as UID too; kubectl describe node looks for it. What has no namespace has its events in the default one.
	node := e.source.cfg.Node
	e.send(metav1.NamespaceDefault, corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: node, UID: types.UID(node)}, kind, reason, message)
}

// Warn writes a warning about a service, as kube-proxy does: with its name as UID.
func (e *Events) Warn(service state.Key, reason, message string) {
	e.send(service.Namespace, corev1.ObjectReference{
		Kind: "Service", APIVersion: "v1", Namespace: service.Namespace, Name: service.Name, UID: types.UID(service.String()),
	}, corev1.EventTypeWarning, reason, message)
}

func (e *Events) send(namespace string, about corev1.ObjectReference, kind, reason, message string) {
	now := metav1.Now()
	if len(message) > maxEventMessage {
		message = strings.ToValidUTF8(message[:maxEventMessage], "")
	}
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("%s.%x", about.Name, now.UnixNano())},
		InvolvedObject: about, Type: kind, Reason: reason, Message: message, Count: 1, FirstTimestamp: now, LastTimestamp: now,
		Source:              corev1.EventSource{Component: component, Host: e.source.cfg.Node},
		ReportingController: component, ReportingInstance: e.source.cfg.Node,
	}
	select {
	case e.queue <- event:
	default:
		e.source.cfg.Log.Warn("an event is lost: too many wait", "reason", reason, "message", message)
	}
}

// maxEventMessage is the API's limit, in bytes.
const maxEventMessage = 1024

func (e *Events) deliver(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case event := <-e.queue:
			if err := e.write(ctx, event); err != nil && ctx.Err() == nil {
				e.source.cfg.Log.Warn("an event is lost", "reason", event.Reason, "message", event.Message, "err", err)
			}
		}
	}
}

// write tries until a server takes the event or refuses it.
func (e *Events) write(ctx context.Context, event *corev1.Event) (err error) {
	for range eventTries {
		once, cancel := context.WithTimeout(ctx, eventTimeout)
		err = e.client.Post().Namespace(event.Namespace).Resource("events").Body(event).MaxRetries(0).Do(once).Error()
		cancel()
		if err == nil || !unreachable(err) {
			return err
		}
		if !sleep(ctx, eventRetry) {
			return ctx.Err()
		}
	}
	return err
}
