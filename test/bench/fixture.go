// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
)

// fixture is what the API server of the tests wants of a testing.TB. What is fatal there is a panic here: a fault of the benchmark.
type fixture struct {
	dir      string
	cleanups []func()
}

func (f *fixture) Helper() {}

func (f *fixture) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

func (f *fixture) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

func (f *fixture) Errorf(format string, args ...any) { f.Fatalf(format, args...) }

func (f *fixture) Cleanup(cleanup func()) { f.cleanups = append(f.cleanups, cleanup) }

// TempDir makes a directory that ends with the run.
func (f *fixture) TempDir() string {
	dir, err := os.MkdirTemp(f.dir, "api-")
	if err != nil {
		f.Fatal(err)
	}
	return dir
}

// close does what was put off, the last first.
func (f *fixture) close() {
	for i := len(f.cleanups) - 1; i >= 0; i-- {
		f.cleanups[i]()
	}
	f.cleanups = nil
}
