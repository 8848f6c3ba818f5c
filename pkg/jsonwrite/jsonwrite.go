// SPDX-License-Identifier: Apache-2.0

// Package jsonwrite writes JSON objects whose members the caller names one by one. It is for the CNI plugin: encoding/json works a type and
// everything nested in it out by reflection before it writes its first value, and a process that lives for milliseconds pays for that each time.
// What a member holds is encoded as encoding/json does. It decodes nothing.
package jsonwrite

import (
	"encoding/json"
	"strconv"
)

// Object is an object in the making. The zero Object is an empty one.
type Object struct {
	members []byte
}

// Bytes returns the object.
func (o *Object) Bytes() []byte {
	return append(append([]byte{'{'}, o.members...), '}')
}

// Raw adds a member whose value is JSON already.
func (o *Object) Raw(name string, value []byte) {
	if len(o.members) > 0 {
		o.members = append(o.members, ',')
	}
	o.members = append(appendString(o.members, name), ':')
	o.members = append(o.members, value...)
}

// String adds a member.
func (o *Object) String(name, value string) {
	o.Raw(name, appendString(nil, value))
}

// Int adds a member.
func (o *Object) Int(name string, value int) {
	o.Raw(name, strconv.AppendInt(nil, int64(value), 10))
}

// OmitString adds a member unless it is empty.
func (o *Object) OmitString(name, value string) {
	if value != "" {
		o.String(name, value)
	}
}

// OmitInt adds a member unless it is zero.
func (o *Object) OmitInt(name string, value int) {
	if value != 0 {
		o.Int(name, value)
	}
}

// OmitTrue adds a member if it is true.
func (o *Object) OmitTrue(name string, value bool) {
	if value {
		o.Raw(name, []byte("true"))
	}
}

// Any adds a member as encoding/json has it, at its price: for what is rarely there.
func (o *Object) Any(name string, value any) error {
	text, err := json.Marshal(value)
	if err == nil {
		o.Raw(name, text)
	}
	return err
}

// List returns an array of values that are JSON already.
func List(values ...[]byte) []byte {
	out := []byte{'['}
	for i, v := range values {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(out, v...)
	}
	return append(out, ']')
}

// Text returns a string as JSON.
func Text(s string) []byte {
	return appendString(nil, s)
}

// appendString leaves what needs an escape to encoding/json.
func appendString(to []byte, s string) []byte {
	for _, c := range []byte(s) {
		if c < ' ' || c > 0x7e || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			text, err := json.Marshal(s)
			if err != nil {
				panic(err) // a string has a form
			}
			return append(to, text...)
		}
	}
	return append(append(append(to, '"'), s...), '"')
}
