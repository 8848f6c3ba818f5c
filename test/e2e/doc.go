// SPDX-License-Identifier: Apache-2.0

// Package e2e tests what only the built binaries together can show: the plugin through libcni, the agent on a directory of manifests,
// real sockets in namespaces. What one package or one program can show is tested there.
package e2e
