// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// root is the repository's top directory, seen from this package.
const root = "../.."

// files returns the repository's source files that keep accepts, as slash-separated paths relative to root. What was built, and what
// version control keeps for itself, is left out.
func files(t *testing.T, keep func(path string) bool) []string {
	t.Helper()
	skipped := map[string]bool{".git": true, "bin": true, "build": true}
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if skipped[rel] {
				return fs.SkipDir
			}
			return nil
		}
		if rel = filepath.ToSlash(rel); d.Type().IsRegular() && keep(rel) {
			found = append(found, rel)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("walk %s: %v", root, err)
	}
	if len(found) == 0 {
		t.Fatalf("no file of the wanted kind under %s: the test looks in the wrong place", root)
	}
	return found
}

// read returns the content of a file named relative to root.
func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func isGo(path string) bool { return strings.HasSuffix(path, ".go") }

func isC(path string) bool { return strings.HasSuffix(path, ".c") || strings.HasSuffix(path, ".h") }

func isMarkdown(path string) bool { return strings.HasSuffix(path, ".md") }

// isGenerated follows the convention of go.dev/s/generatedcode.
func isGenerated(content []byte) bool {
	for line := range bytes.Lines(content) {
		if bytes.HasPrefix(line, []byte("// Code generated ")) && bytes.HasSuffix(bytes.TrimSpace(line), []byte(" DO NOT EDIT.")) {
			return true
		}
		if bytes.HasPrefix(line, []byte("package ")) {
			return false
		}
	}
	return false
}

// TestNoExecutables: what a build leaves is in bin and build. Of compiled files only the BPF objects are kept, so that a clone needs no clang.
func TestNoExecutables(t *testing.T) {
	for _, path := range files(t, func(path string) bool { return !strings.HasSuffix(path, "_bpfel.o") }) {
		if bytes.HasPrefix(read(t, path), []byte("\x7fELF")) {
			t.Errorf("%s is a compiled program: it belongs into bin or build", path)
		}
	}
}
