// SPDX-License-Identifier: Apache-2.0

package main

// Compiler and flags come from the Makefile's generate target, as for pkg/bpf.
//go:generate go tool bpf2go -target bpfel -no-global-types -output-stem floor floor bpf/floor.bpf.c
