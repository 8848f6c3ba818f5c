// SPDX-License-Identifier: Apache-2.0

// Etcd is the etcd server of the test cluster. The server's own main package cannot be built as a dependency, because its module
// has replace directives; this one has none.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
