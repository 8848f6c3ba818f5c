// SPDX-License-Identifier: Apache-2.0

// Package meta holds tests on the repository itself: who may import whom and why, licences, package docs, file sizes, the order of the C
// headers, that the documents speak of files, make targets and drop reasons that exist, and that every corner case has a test. It has no
// code outside its tests.
package meta
