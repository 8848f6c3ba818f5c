// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"path"
	"strings"
	"testing"
)

// TestLicenceHeaders requires the SPDX line that names a file's licence.
func TestLicenceHeaders(t *testing.T) {
	const project, programs = "SPDX-License-Identifier: Apache-2.0", "SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause"
	for _, file := range files(t, func(string) bool { return true }) {
		content := read(t, file)
		first, rest, _ := bytes.Cut(content, []byte("\n"))
		var want string
		switch {
		case isGo(file) && !isGenerated(content):
			want = "// " + project
		case strings.HasPrefix(file, "bpf/") && strings.HasSuffix(file, ".c"):
			want = "// " + programs
		case strings.HasPrefix(file, "bpf/") && strings.HasSuffix(file, ".h"):
			want = "/* " + programs + " */"
		case path.Base(file) == "Makefile":
			want = "# " + project
		case bytes.HasPrefix(first, []byte("#!")):
			want = "# " + project
			first, _, _ = bytes.Cut(rest, []byte("\n"))
		default:
			continue
		}
		if string(first) != want {
			t.Errorf("%s: licence line = %q, want %q", file, first, want)
		}
	}
}

// TestPackageDocs requires of every package a doc comment that says what it owns.
func TestPackageDocs(t *testing.T) {
	documented := map[string]bool{}
	for _, file := range files(t, isGo) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f := parse(t, file, parser.PackageClauseOnly|parser.ParseComments)
		dir := path.Dir(file)
		documented[dir] = documented[dir] || f.Doc != nil && len(f.Doc.Text()) > 40
	}
	for dir, ok := range documented {
		if !ok {
			t.Errorf("%s: no package comment that says what the package owns and what it does not", dir)
		}
	}
}

// TestExitOnlyInMain keeps library code from ending the process: deferred clean-up would not run.
func TestExitOnlyInMain(t *testing.T) {
	for _, file := range files(t, isGo) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f := parse(t, file, parser.SkipObjectResolution)
		if f.Name.Name == "main" {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && (x.Name == "os" && sel.Sel.Name == "Exit" || x.Name == "log" && strings.HasPrefix(sel.Sel.Name, "Fatal")) {
				t.Errorf("%s: %s.%s outside a main package: return an error", file, x.Name, sel.Sel.Name)
			}
			return true
		})
	}
}

func parse(t *testing.T, file string, mode parser.Mode) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, read(t, file), mode)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestFileLength keeps every file short enough to be read whole.
func TestFileLength(t *testing.T) {
	const most = 500
	for _, file := range files(t, func(path string) bool { return isGo(path) || isC(path) }) {
		content := read(t, file)
		if n := bytes.Count(content, []byte("\n")); n > most && !isGenerated(content) {
			t.Errorf("%s: %d lines, want at most %d: split it by subject", file, n, most)
		}
	}
}

// TestNoReplace: a replace directive would give whoever imports or installs Margay something else than what we test.
func TestNoReplace(t *testing.T) {
	for _, file := range files(t, func(p string) bool { return path.Base(p) == "go.mod" }) {
		for line := range bytes.Lines(read(t, file)) {
			if bytes.HasPrefix(bytes.TrimSpace(line), []byte("replace")) {
				t.Errorf("%s: %s", file, bytes.TrimSpace(line))
			}
		}
	}
}
