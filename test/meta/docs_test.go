// SPDX-License-Identifier: Apache-2.0

package meta

import (
	"maps"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	fence      = regexp.MustCompile("(?ms)^\\s*```.*?^\\s*```")
	inlineCode = regexp.MustCompile("`([^`\n]+)`")
	link       = regexp.MustCompile(`\]\(([^)#\s]+)[^)]*\)`)
	makeCall   = regexp.MustCompile(`\bmake ([a-z][a-z-]*)`)
	makeTarget = regexp.MustCompile(`(?m)^([a-z][a-z-]*):`)
	repoPath   = regexp.MustCompile(`^(\.ci|agent|bpf|conf|ctl|docs|hack|install|internal|ipam|pkg|plugin|test)/[A-Za-z0-9_./*-]*$`)
)

// TestDocumentedPathsExist follows every relative link of the documents, and every path of the repository that they name as `code`.
func TestDocumentedPathsExist(t *testing.T) {
	for _, file := range files(t, isMarkdown) {
		text := fence.ReplaceAllString(string(read(t, file)), "")
		for _, m := range inlineCode.FindAllStringSubmatch(text, -1) {
			if repoPath.MatchString(m[1]) && !exists(m[1]) {
				t.Errorf("%s names `%s`, which does not exist", file, m[1])
			}
		}
		for _, m := range link.FindAllStringSubmatch(inlineCode.ReplaceAllString(text, ""), -1) {
			if !strings.Contains(m[1], "://") && !exists(path.Join(path.Dir(file), m[1])) {
				t.Errorf("%s links to %s, which does not exist", file, m[1])
			}
		}
	}
}

// exists takes a path relative to root, or a pattern that must match something.
func exists(pattern string) bool {
	found, err := filepath.Glob(filepath.Join(root, pattern))
	return err == nil && len(found) > 0
}

// TestDocumentedTargetsExist requires every `make target` of the documents to be one.
func TestDocumentedTargetsExist(t *testing.T) {
	targets := map[string]bool{}
	for _, m := range makeTarget.FindAllSubmatch(read(t, "Makefile"), -1) {
		targets[string(m[1])] = true
	}
	for _, file := range files(t, isMarkdown) {
		text := string(read(t, file))
		code := append(fence.FindAllString(text, -1), inlineCode.FindAllString(fence.ReplaceAllString(text, ""), -1)...)
		for _, m := range makeCall.FindAllStringSubmatch(strings.Join(code, "\n"), -1) {
			if !targets[m[1]] {
				t.Errorf("%s says `make %s`, which the Makefile does not have", file, m[1])
			}
		}
	}
}

// TestMakeTargetsHaveHelp requires of every target the text that bare make prints.
func TestMakeTargetsHaveHelp(t *testing.T) {
	help := regexp.MustCompile(`(?m)^([a-z][a-z-]*):.* ## \S`)
	helped := map[string]bool{}
	makefile := read(t, "Makefile")
	for _, m := range help.FindAllSubmatch(makefile, -1) {
		helped[string(m[1])] = true
	}
	for _, m := range makeTarget.FindAllSubmatch(makefile, -1) {
		if !helped[string(m[1])] {
			t.Errorf("Makefile: target %s has no `## text`", m[1])
		}
	}
}

var (
	dropEnum   = regexp.MustCompile(`(?s)enum drop_reason \{(.*?)\n\}`)
	dropMember = regexp.MustCompile(`(?m)^\s*DROP_([A-Z0-9_]+) = (\d+),`)
	dropRow    = regexp.MustCompile("(?m)^\\| (\\d+) \\| `([a-z0-9_]+)` \\| ([^|]+) \\| ([^|]+) \\|$")
)

// TestDropReasonsDocumented compares the table of docs/drop-reasons.md with the enum, in both directions and by number.
func TestDropReasonsDocumented(t *testing.T) {
	want := map[string]string{}
	for _, m := range dropMember.FindAllStringSubmatch(dropEnum.FindString(string(read(t, "bpf/types.h"))), -1) {
		if m[1] != "NONE" && m[1] != "REASONS" {
			want[strings.ToLower(m[1])] = m[2]
		}
	}
	if len(want) == 0 {
		t.Fatal("no enum drop_reason in bpf/types.h")
	}
	got := map[string]string{}
	for _, m := range dropRow.FindAllStringSubmatch(string(read(t, "docs/drop-reasons.md")), -1) {
		if len(strings.TrimSpace(m[3])) < 10 || len(strings.TrimSpace(m[4])) < 10 {
			t.Errorf("docs/drop-reasons.md: %s needs a cause and a cure", m[2])
		}
		got[m[2]] = m[1]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("drop reasons of bpf/types.h and docs/drop-reasons.md (-want +got):\n%s", diff)
	}
}

// TestDesignNotesIndexed requires docs/design/README.md to list every note, and every pattern in its table to match something.
func TestDesignNotesIndexed(t *testing.T) {
	index := string(read(t, "docs/design/README.md"))
	listed := map[string]bool{}
	for _, m := range link.FindAllStringSubmatch(index, -1) {
		listed[m[1]] = true
	}
	notes, err := filepath.Glob(filepath.Join(root, "docs/design/[0-9]*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, note := range notes {
		if name := filepath.Base(note); !listed[name] {
			t.Errorf("docs/design/README.md does not list %s", name)
		}
	}
}

// TestGlossarySorted keeps the terms of docs/glossary.md in alphabetical order, each once.
func TestGlossarySorted(t *testing.T) {
	if _, err := os.Stat(filepath.Join(root, "docs/glossary.md")); err != nil {
		t.Fatal(err)
	}
	var terms []string
	for _, m := range regexp.MustCompile(`(?m)^- \*\*([^*]+)\*\*`).FindAllStringSubmatch(string(read(t, "docs/glossary.md")), -1) {
		terms = append(terms, strings.ToLower(m[1]))
	}
	unique := map[string]bool{}
	for _, term := range terms {
		unique[term] = true
	}
	if want := slices.Sorted(maps.Keys(unique)); !slices.Equal(terms, want) || len(terms) == 0 {
		t.Errorf("terms of docs/glossary.md are not sorted, each once (-want +got):\n%s", cmp.Diff(want, terms))
	}
}
