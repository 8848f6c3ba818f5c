// SPDX-License-Identifier: Apache-2.0

// Package conf is the configuration that Margay ships, embedded so that margay-install needs no file beside itself. It knows nothing of
// what the configuration means; its tests load every file with the code that reads it on a node.
package conf

import _ "embed"

// ConflistName is the file name that the conflist has in a CNI configuration directory. Runtimes take the first file by name.
const ConflistName = "10-margay.conflist"

// Conflist is the content of conf/10-margay.conflist, with example address ranges.
//
//go:embed 10-margay.conflist
var Conflist []byte
