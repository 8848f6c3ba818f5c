// SPDX-License-Identifier: Apache-2.0

package build

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// imageSources are our own files that decide what is in the images.
var imageSources = []string{"test/cluster/images/*.go", "test/cluster/images/*/*"}

// images packs the images again if a program in them, or what packs them, has changed.
func images(ctx context.Context, root, dir string, log *slog.Logger) error {
	key, err := imageKey(root, dir)
	if err != nil {
		return err
	}
	out, keyFile := filepath.Join(dir, "images"), filepath.Join(dir, "images", ".key")
	if old, err := os.ReadFile(keyFile); err == nil && string(old) == key {
		return nil
	}
	start := time.Now()
	cmd := exec.CommandContext(ctx, "go", "run", "./test/cluster/images", "-bin", filepath.Join(dir, "bin"), "-out", out)
	cmd.Dir = root
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("pack the images: %w: %s", err, output)
	}
	log.Info("packed the images", "seconds", time.Since(start).Round(100*time.Millisecond).Seconds())
	return os.WriteFile(keyFile, []byte(key), 0o644)
}

func imageKey(root, dir string) (string, error) {
	var files []string
	for _, p := range imagePrograms() {
		files = append(files, filepath.Join(dir, "bin", ".keys", p.name))
	}
	for _, pattern := range imageSources {
		found, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return "", err
		}
		if len(found) == 0 {
			return "", fmt.Errorf("no files match %s", pattern)
		}
		slices.Sort(found)
		files = append(files, found...)
	}
	h := sha256.New()
	for _, path := range files {
		if err := hashFile(h, path); err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
