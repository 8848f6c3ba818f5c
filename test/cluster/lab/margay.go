// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// repository is the top directory that Options.Dir, build/cluster, lies in.
func (c *Cluster) repository() string { return filepath.Dir(filepath.Dir(c.Dir)) }

// margayImage is Margay's image as make image builds it.
func (c *Cluster) margayImage() string {
	return filepath.Join(c.repository(), "build", "margay-image.tar")
}

// margayManifest is what users apply.
func (c *Cluster) margayManifest() string {
	return filepath.Join(c.repository(), "install", "kubernetes", "margay.yaml")
}

// margayBuilt reports whether there is an image to install.
func (c *Cluster) margayBuilt() bool {
	_, err := os.Stat(c.margayImage())
	return err == nil
}

// InstallMargay installs Margay the way users do: the image, which no registry has, and one kubectl apply. It waits until
// every node runs it.
func (c *Cluster) InstallMargay(ctx context.Context) error {
	if err := c.eachNode(func(n *Node) error { return n.ImportImages(ctx, c.margayImage()) }); err != nil {
		return err
	}
	if _, err := c.Kubectl(ctx, "apply", "--filename="+c.margayManifest()); err != nil {
		return err
	}
	_, err := c.Kubectl(ctx, "--namespace=kube-system", "rollout", "status", "daemonset/margay", "--timeout=3m")
	if err != nil {
		logs, logErr := c.Kubectl(ctx, "--namespace=kube-system", "logs", "daemonset/margay", "--all-containers", "--tail=20")
		return errors.Join(fmt.Errorf("wait for Margay: %w; its log ends with: %s", err, logs), logErr)
	}
	return nil
}
