# SPDX-License-Identifier: Apache-2.0
#
# `make` alone prints the targets. No target needs a container, nor any network beyond the Go module proxy and Debian's packages.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Time for one benchmark, and for one fuzz target.
BENCHTIME ?= 1s
FUZZTIME ?= 20s
# How long soak goes on, in each routing mode.
SOAKTIME ?= 60s
# Flags of make conformance, for example CONFORMANCE_FLAGS='-groups base -focus smoke'; without -write the document stays as it is.
CONFORMANCE_FLAGS ?= -write docs/conformance.md
# The test cluster: how many nodes, which families (dual, ipv4, ipv6), which network (margay, reference, none), and in which machine
# cluster-shell starts a shell (node1 ..., control, client).
NODES ?= 2
FAMILY ?= dual
CNI ?= margay
NODE ?= node1
# Further flags for every go test, for example TESTFLAGS='-run TestAdd -v'.
TESTFLAGS ?=
# Flags of bench and bench-full, for example BENCHFLAGS='-strict -cni DIRECTORY-OF-A-CNI'.
BENCHFLAGS ?=
# Kernels of test-vm.
KERNELS ?= 6.1 6.12
# Flags for bin/margay-install, for example INSTALL_FLAGS='--bin-dir /usr/local/bin'.
INSTALL_FLAGS ?=

BINARIES := margay margay-loader margay-ipam margay-agent margayctl margay-install
main_margay := ./plugin
main_margay-loader := ./plugin/loader
main_margay-ipam := ./ipam
main_margay-agent := ./agent
main_margayctl := ./ctl
main_margay-install := ./install

# The C compiler is pinned, because the committed objects are compared byte for byte. -nostdinc: bpf/headers is all that they see.
export BPF2GO_CC := clang-19
export BPF2GO_STRIP := llvm-strip-19
export BPF2GO_CFLAGS := -O2 -g -Wall -Wextra -Werror -mcpu=v3 -nostdinc -fno-ident -I../../bpf

# Modules with tests beside the main one, so that what they require stays out of its go.mod.
MODULES := hack/image hack/manifests

# Modules of the test cluster that have a main of their own; the others there only pin what is built. Vetted with the flags that they are
# built with, so that their dependencies are compiled once.
TOOL_MODULES := test/cluster/tools/etcd test/cluster/tools/coredns

STATICCHECK := go tool -modfile=hack/tools/go.mod staticcheck
SCRIPTS = $(shell grep -rlE '^#!.*\b(ba)?sh\b' hack .ci)

# Packages whose tests import internal/testutil need root (privileged.Require is there) and are tested by test-root, the others by
# test-unit. In the shell, not by make, so that a package that does not load ends the recipe.
list_packages := go list -f '{{.ImportPath}} {{.TestImports}} {{.XTestImports}}' ./...
root_packages := $(list_packages) | awk '/ .*\/internal\/testutil\// {print $$1}'
unit_packages := $(list_packages) | awk '!/ .*\/internal\/testutil\// {print $$1}'

.PHONY: help build $(BINARIES) demo test test-unit test-root test-vm soak conformance cluster-build cluster-up cluster-down cluster-shell cluster-test test-cluster cluster-smoke lint fmt generate generate-check bench bench-full bench-smoke bench-packages fuzz ci deps clean install uninstall image test-modules manifests

help: ## Print this list
	@echo 'Margay $(VERSION)'
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r target text; do \
		printf '  %-16s%s\n' "$$target" "$$text"; done

build: $(BINARIES) ## Build the static binaries into bin/

$(BINARIES):
	CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)' -o bin/$@ $(main_$@)

# The image that install/ names: :latest until there is a release, and the version. Its times are the commit's: the same commit makes the same bytes.
image: build ## Pack the binaries into an OCI image, build/margay-image.tar (no container engine needed)
	cd hack/image && go run . --bin ../../bin --source ../.. --output ../../build/margay-image.tar \
		--version '$(VERSION)' --tag 'margay-cni/margay:$(VERSION)' --tag margay-cni/margay:latest \
		--commit "$$(git rev-parse HEAD 2>/dev/null || true)" --created "$$(git show -s --format=%cI HEAD 2>/dev/null || echo 1970-01-01T00:00:00Z)"

manifests: ## Render install/kubernetes/margay.yaml from the Helm chart
	cd hack/manifests && go run . --chart ../../install/helm/margay --output ../../install/kubernetes/margay.yaml

demo: build ## Show Margay at work: real pods, packets and bytes on this machine (needs root)
	./hack/demo

test: test-unit test-modules test-root ## Run every test; as root also the ones that need it

test-unit: ## Run the tests of the packages that need no root (with the race detector in CI)
	packages=$$($(unit_packages)); go test $(if $(CI),-race) -timeout 5m $(TESTFLAGS) $$packages

test-modules: ## Run the tests of the modules of their own that make image and manifests
	for module in $(MODULES); do (cd $$module && go test -timeout 10m $(TESTFLAGS) ./...); done

# One package at a time: some of them measure, and all of them share the two cores of a CI machine.
test-root: ## Run the tests of the packages that need root; without it most of them are skipped
	@[[ $$EUID -eq 0 ]] || echo 'test-root: not root: the tests that need it are skipped'
	packages=$$($(root_packages)); go test -count=1 -p 1 -timeout 20m $(TESTFLAGS) $$packages

test-vm: ## Run the tests that need root on Debian's kernels 6.1 and 6.12 in emulated machines (KERNELS, PACKAGES, VM_FLAGS, TIME)
	hack/install-deps deps-vm.txt
	hack/vm/run $(KERNELS)

soak: ## Open and close connections for SOAKTIME=60s in each routing mode while pods, policies, nodes and agents change (needs root)
	go test -count=1 -timeout 30m -run '^TestSoak$$' -v $(TESTFLAGS) ./test/nodes -soak $(SOAKTIME)

conformance: cluster-build image ## Run the upstream tests of SIG Network on the test cluster, or start one, and write docs/conformance.md (needs root)
	go build -o build/cluster/bin/conformance ./test/cluster/conformance
	build/cluster/bin/conformance -up $(CONFORMANCE_FLAGS)

cluster-build: ## Build what the test cluster runs: Kubernetes, containerd, etcd, images (a quarter of an hour the first time)
	hack/install-deps deps-cluster.txt
	go run ./test/cluster build

cluster-up: cluster-build $(if $(filter margay,$(CNI)),image) ## Start a Kubernetes cluster of NODES=2 fake machines on this one, FAMILY=dual, CNI=margay (needs root)
	go run ./test/cluster up --nodes $(NODES) --family $(FAMILY) --cni $(CNI)

cluster-down: ## End the test cluster and remove every trace of it
	go run ./test/cluster down

cluster-shell: ## Start a shell in a machine of the test cluster: NODE=node1, control, or client
	@go run ./test/cluster shell --node $(NODE)

cluster-test: cluster-build ## Test the test cluster itself, with the reference network (needs root, about 6 minutes)
	go test -tags cluster -count=1 -timeout 40m $(TESTFLAGS) ./test/cluster/lab

test-cluster: cluster-build image ## Test Margay on a Kubernetes cluster that is made for it and ended again (needs root)
	go test -tags cluster -count=1 -timeout 60m $(TESTFLAGS) ./test/cluster/e2e -up -nodes $(NODES) -family $(FAMILY) -cni $(CNI)

cluster-smoke: cluster-build image ## A minute of test-cluster: install Margay with its manifest, ask pods, services, NodePorts and DNS (needs root)
	go test -tags cluster -count=1 -timeout 10m -run '^TestSmoke$$' $(TESTFLAGS) ./test/cluster/e2e -up -cluster smoke

lint: ## gofmt, go vet, staticcheck, shellcheck
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [[ -z $$unformatted ]] || { echo "not formatted, run make fmt: $$unformatted"; exit 1; }
	go vet ./...
	$(STATICCHECK) ./...
	go vet -tags cluster ./test/cluster/...
	$(STATICCHECK) -tags cluster ./test/cluster/...
	for module in $(MODULES); do (cd $$module && go vet ./... && go tool -modfile=../tools/go.mod staticcheck ./...); done
	for module in $(TOOL_MODULES); do (cd $$module && CGO_ENABLED=0 go vet -trimpath ./...); done
	@if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS); else echo 'lint: no shellcheck here: scripts are not checked (make deps)'; [[ -z "$${CI:-}" ]]; fi

fmt: ## Format the Go files
	gofmt -w $$(git ls-files '*.go')

generate: ## Compile bpf/ and generate pkg/bpf from it (needs clang-19: make deps)
	@command -v $(BPF2GO_CC) >/dev/null || { echo 'generate: no $(BPF2GO_CC) here: make deps'; exit 1; }
	cd pkg/bpf && go generate ./...
	cd test/bench && go generate ./...

generate-check: generate ## Require that the committed generated files are what bpf/ generates
	@generated='pkg/bpf test/bench/*_bpfel.*'; changed=$$(git status --porcelain -- $$generated); [[ -z $$changed ]] || \
		{ git --no-pager diff --stat -- $$generated; echo "generate-check: not what is committed:"; echo "$$changed"; exit 1; }

bench: ## Measure Margay beside others, compare with the committed results, write docs/benchmarks.md (needs root, about 5 minutes)
	go run ./test/bench -write $(BENCHFLAGS)

bench-full: ## The same with more rounds and what takes long (needs root, about 15 minutes; says on standard error how far it is)
	go run ./test/bench -full -write $(BENCHFLAGS)

bench-smoke: ## Run every benchmark once, briefly: shows that they work (needs root)
	go run ./test/bench -smoke -cni example=test/bench/contenders/ptp-kube-proxy
	$(MAKE) bench-packages BENCHTIME=1x

bench-packages: ## Run the Go benchmarks of the packages (BENCHTIME=1s for each)
	go test -run '^$$' -bench . -benchmem -benchtime $(BENCHTIME) -p 1 -timeout 30m $(TESTFLAGS) ./...

fuzz: ## Run every fuzz target for FUZZTIME=20s
	hack/fuzz $(FUZZTIME)

ci: export REQUIRE_PRIVILEGED = 1
ci: ## What .ci/run runs: deps, lint, generate-check, build, test as root, demo, every benchmark once, smoke of the test cluster
	$(MAKE) deps
	$(MAKE) lint
	$(MAKE) generate-check
	$(MAKE) build
	$(MAKE) test CI=true
	$(MAKE) demo
	$(MAKE) bench-smoke
	$(MAKE) cluster-smoke

deps: ## Install the Debian packages of hack/deps.txt that are missing
	hack/install-deps

clean: ## Remove what was built
	@! compgen -G 'build/cluster/state/*/cluster.json' || { echo 'clean: these test clusters are there, perhaps running: make cluster-down, or go run ./test/cluster down --name NAME'; exit 1; }
	rm -rf bin build

install: ## Install what was built on this machine (as root, after make build)
	@[[ -x bin/margay-install ]] || { echo 'install: nothing built yet: make build'; exit 1; }
	bin/margay-install $(INSTALL_FLAGS)

uninstall: ## Remove every trace of Margay from this machine (as root)
	@[[ -x bin/margay-install ]] || { echo 'uninstall: bin/margay-install is not built: make build'; exit 1; }
	bin/margay-install --uninstall $(INSTALL_FLAGS)
