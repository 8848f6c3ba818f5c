// SPDX-License-Identifier: Apache-2.0

package agent

// mailbox hands the newest value from one producer to one consumer. A value that nobody has taken yet is replaced: the consumer sees
// the latest state of things, not their history.
type mailbox[T any] chan T

func newMailbox[T any]() mailbox[T] {
	return make(mailbox[T], 1)
}

// put never blocks. Only one goroutine may put.
func (m mailbox[T]) put(v T) {
	for {
		select {
		case m <- v:
			return
		default:
		}
		select {
		case <-m:
		default:
		}
	}
}
