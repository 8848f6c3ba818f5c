// SPDX-License-Identifier: Apache-2.0

package k8s

import (
	"fmt"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// item is an object on its way from the API server to its table, trimmed: what client-go's reflector needs of it, and what is kept.
type item struct {
	metav1.TypeMeta
	metav1.ObjectMeta
	// value is what is kept; nil for an object that takes no part.
	value any
}

// DeepCopyObject implements runtime.Object. Nobody writes to items.
func (i *item) DeepCopyObject() runtime.Object {
	clone := *i
	return &clone
}

// itemList is a list of them.
type itemList struct {
	metav1.TypeMeta
	metav1.ListMeta
	Items []item
}

// DeepCopyObject implements runtime.Object.
func (l *itemList) DeepCopyObject() runtime.Object {
	clone := *l
	return &clone
}

// trim makes an item of an object. Bookmarks have nothing but a version and annotations.
func (k *kind) trim(o runtime.Object, event watch.EventType) (*item, error) {
	m, err := meta.Accessor(o)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", k.name, err)
	}
	out := &item{ObjectMeta: metav1.ObjectMeta{Namespace: m.GetNamespace(), Name: m.GetName(), ResourceVersion: m.GetResourceVersion()}}
	switch event {
	case watch.Bookmark:
		out.Annotations = m.GetAnnotations()
	case watch.Deleted:
	default:
		out.value = k.convert(o)
	}
	return out, nil
}

// trimList makes items of a list's objects.
func (k *kind) trimList(list runtime.Object) (*itemList, error) {
	m, err := meta.ListAccessor(list)
	if err != nil {
		return nil, fmt.Errorf("read list of %s: %w", k.name, err)
	}
	out := &itemList{ListMeta: metav1.ListMeta{
		ResourceVersion: m.GetResourceVersion(), Continue: m.GetContinue(), RemainingItemCount: m.GetRemainingItemCount(),
	}}
	out.Items = make([]item, 0, meta.LenList(list))
	err = meta.EachListItem(list, func(o runtime.Object) error {
		i, err := k.trim(o, watch.Added)
		if err == nil {
			out.Items = append(out.Items, *i)
		}
		return err
	})
	return out, err
}
