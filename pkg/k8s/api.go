// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// api asks for objects of one resource.
type api interface {
	list(ctx context.Context, options metav1.ListOptions) (runtime.Object, error)
	watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error)
}

// get is a request for a resource with options. Retries are the reflector's business.
func get(ctx context.Context, c rest.Interface, resource string, options metav1.ListOptions) (context.Context, *outcome, *rest.Request) {
	ctx, o := withOutcome(ctx)
	r := c.Get().Resource(resource).MaxRetries(0).SpecificallyVersionedParams(&options, metav1.ParameterCodec, metav1.SchemeGroupVersion)
	return ctx, o, r
}

// typedAPI decodes into the types of the scheme.
type typedAPI struct {
	client   rest.Interface
	resource string
	newList  func() runtime.Object
}

func (a *typedAPI) list(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	ctx, _, r := get(ctx, a.client, a.resource, options)
	out := a.newList()
	return out, r.Do(ctx).Into(out)
}

func (a *typedAPI) watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	options.Watch = true
	ctx, o, r := get(ctx, a.client, a.resource, options)
	w, err := r.Watch(ctx)
	if failed := o.failure(); failed != nil && err == nil {
		w.Stop()
		return nil, failed
	}
	return w, err
}

// rawAPI keeps objects as the JSON that the server sent, so that fields which the Go types do not know are not lost.
type rawAPI struct {
	client   rest.Interface
	resource string
}

// rawObject is an object as it came.
type rawObject struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	raw json.RawMessage
}

// DeepCopyObject implements runtime.Object. Nobody writes to it.
func (o *rawObject) DeepCopyObject() runtime.Object {
	clone := *o
	return &clone
}

// UnmarshalJSON implements json.Unmarshaler.
func (o *rawObject) UnmarshalJSON(data []byte) error {
	var head struct {
		Metadata struct {
			Name            string            `json:"name"`
			ResourceVersion string            `json:"resourceVersion"`
			Annotations     map[string]string `json:"annotations"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return err
	}
	o.Name, o.ResourceVersion, o.Annotations = head.Metadata.Name, head.Metadata.ResourceVersion, head.Metadata.Annotations
	o.raw = append(json.RawMessage(nil), data...)
	return nil
}

// rawList is a list of them.
type rawList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata"`
	Items           []rawObject `json:"items"`
}

// DeepCopyObject implements runtime.Object.
func (l *rawList) DeepCopyObject() runtime.Object {
	clone := *l
	return &clone
}

func (a *rawAPI) list(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
	ctx, _, r := get(ctx, a.client, a.resource, options)
	data, err := r.Do(ctx).Raw()
	if err != nil {
		return nil, statusOf(data, err)
	}
	out := &rawList{}
	if err := json.Unmarshal(data, out); err != nil {
		return nil, apierrors.NewInternalError(fmt.Errorf("decode list of %s: %w", a.resource, err))
	}
	return out, nil
}

// statusOf is the status in an answer's body, if that is what it is.
func statusOf(data []byte, err error) error {
	var status metav1.Status
	if json.Unmarshal(data, &status) == nil && status.Kind == "Status" && status.Code != 0 {
		return &apierrors.StatusError{ErrStatus: status}
	}
	return err
}

func (a *rawAPI) watch(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
	options.Watch = true
	ctx, o, r := get(ctx, a.client, a.resource, options)
	body, err := r.Stream(ctx)
	if failed := o.failure(); failed != nil && err == nil {
		return nil, failed
	}
	if err != nil {
		return nil, err
	}
	return watch.NewStreamWatcher(&rawDecoder{body: body, frames: json.NewDecoder(body)}, reporter{}), nil
}

// rawDecoder reads the events of a watch in JSON.
type rawDecoder struct {
	body   io.ReadCloser
	frames *json.Decoder
}

// Decode implements watch.Decoder.
func (d *rawDecoder) Decode() (watch.EventType, runtime.Object, error) {
	var frame struct {
		Type   watch.EventType `json:"type"`
		Object json.RawMessage `json:"object"`
	}
	if err := d.frames.Decode(&frame); err != nil {
		return "", nil, err
	}
	if frame.Type == watch.Error {
		status := &metav1.Status{}
		err := json.Unmarshal(frame.Object, status)
		return frame.Type, status, err
	}
	object := &rawObject{}
	err := json.Unmarshal(frame.Object, object)
	return frame.Type, object, err
}

// Close implements watch.Decoder.
func (d *rawDecoder) Close() {
	_ = d.body.Close() // nobody reads any more
}

// reporter turns an error in a stream into an event.
type reporter struct{}

// AsObject implements watch.Reporter.
func (reporter) AsObject(err error) runtime.Object {
	status := apierrors.NewGenericServerResponse(500, "watch", schema.GroupResource{}, "", err.Error(), 0, false).Status()
	return &status
}
