// SPDX-License-Identifier: Apache-2.0

// Cluster makes a Kubernetes cluster of fake machines on this one, to try and to test Margay in (package lab), and ends it again. See
// docs/test-cluster.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/test/cluster/build"
	"github.com/margay-cni/margay/test/cluster/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// run returns the exit status: that of the command that shell, exec or kubectl ran, 1 for every other failure.
func run(ctx context.Context, args []string) int {
	root := command()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if ended, ok := errors.AsType[endedWith](err); ok {
		return max(int(ended), 1)
	}
	fmt.Fprintln(os.Stderr, "cluster:", err)
	return 1
}

// flags are what every verb knows.
type flags struct {
	dir, name string
	log       *slog.Logger
}

func command() *cobra.Command {
	f := &flags{log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: noTime}))}
	root := &cobra.Command{Use: "cluster", Short: "A Kubernetes cluster of fake machines", SilenceUsage: true, SilenceErrors: true}
	root.PersistentFlags().StringVar(&f.dir, "dir", "build/cluster", "what was built, and the clusters' state")
	root.PersistentFlags().StringVar(&f.name, "name", "default", "the cluster's name")
	root.AddCommand(f.build(), f.up(), f.down(), f.shell(), f.exec(), f.kubectl(), f.kubeconfig(), f.reboot(), f.service())
	return root
}

func noTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
		return slog.Attr{}
	}
	return a
}

func (f *flags) build() *cobra.Command {
	tests := true
	cmd := &cobra.Command{
		Use: "build", Short: "Build the programs and images (a quarter of an hour the first time)", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(f.dir)
			if err != nil {
				return err
			}
			return build.Everything(cmd.Context(), ".", dir, tests, f.log)
		},
	}
	cmd.Flags().BoolVar(&tests, "tests", true, "also the upstream tests")
	return cmd
}

func (f *flags) up() *cobra.Command {
	o := lab.Options{}
	var family string
	cmd := &cobra.Command{
		Use: "up", Short: "Make the cluster, as root", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Dir, o.Name, o.Family = f.dir, f.name, lab.Family(family)
			start := time.Now()
			c, err := lab.Up(cmd.Context(), o, f.log)
			if err != nil {
				return err
			}
			f.log.Info("the cluster is up", "seconds", time.Since(start).Round(100*time.Millisecond).Seconds(), "kubeconfig", c.Kubeconfig())
			return nil
		},
	}
	cmd.Flags().IntVar(&o.Nodes, "nodes", 2, "how many nodes")
	cmd.Flags().StringVar(&family, "family", string(lab.Dual), "dual, ipv4 or ipv6")
	cmd.Flags().StringVar(&o.CNI, "cni", "margay", strings.Join(lab.CNIs, ", "))
	return cmd
}

func (f *flags) down() *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "End the cluster and remove every trace of it", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return lab.Down(f.dir, f.name) },
	}
}

func (f *flags) shell() *cobra.Command {
	var node string
	cmd := &cobra.Command{
		Use: "shell [COMMAND ...]", Short: "Run a shell or a command inside a machine",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Open(f.dir, f.name)
			if err != nil {
				return err
			}
			m, err := c.Machine(node)
			if err != nil {
				return err
			}
			if len(args) == 0 {
				args = []string{"bash", "-l"}
			}
			inside, err := m.Command(cmd.Context(), args...)
			return foreground(inside, err)
		},
	}
	cmd.Flags().StringVar(&node, "node", "node1", "node1 and so on, control, or client")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (f *flags) exec() *cobra.Command {
	cmd := &cobra.Command{
		Use: "exec COMMAND ...", Short: "Run a command that reaches the API server: with the control plane's network, and KUBECONFIG set",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Open(f.dir, f.name)
			if err != nil {
				return err
			}
			inside, err := c.Command(cmd.Context(), args...)
			return foreground(inside, err)
		},
	}
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (f *flags) kubectl() *cobra.Command {
	cmd := &cobra.Command{
		Use: "kubectl ARGUMENTS ...", Short: "Run kubectl as the cluster's administrator",
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Open(f.dir, f.name)
			if err != nil {
				return err
			}
			inside, err := c.KubectlCommand(cmd.Context(), args...)
			return foreground(inside, err)
		},
	}
	cmd.Flags().SetInterspersed(false) // what comes behind the first argument is kubectl's
	return cmd
}

// endedWith is the exit status of a command that spoke for itself.
type endedWith int

func (e endedWith) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// foreground runs a command with our own input and output.
func foreground(cmd *exec.Cmd, err error) error {
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return endedWith(exit.ExitCode())
	}
	return err
}

func (f *flags) kubeconfig() *cobra.Command {
	return &cobra.Command{
		Use: "kubeconfig", Short: "Print the path of the administrator's kubeconfig", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := lab.Open(f.dir, f.name)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), c.Kubeconfig())
			return err
		},
	}
}

func (f *flags) reboot() *cobra.Command {
	return &cobra.Command{
		Use: "reboot NODE", Short: "Switch a node off and on again, and wait until it is ready", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := lab.Open(f.dir, f.name)
			if err != nil {
				return err
			}
			for _, n := range c.Nodes() {
				if n.Name == args[0] {
					return errors.Join(n.Reboot(cmd.Context()), c.WaitReady(cmd.Context(), n.Name))
				}
			}
			return fmt.Errorf("no node %s", args[0])
		},
	}
}

func (f *flags) service() *cobra.Command {
	return &cobra.Command{
		Use: "service start|stop|kill MACHINE SERVICE", Short: "Start or end kubelet, containerd, kube-apiserver ... of a machine", Args: cobra.ExactArgs(3),
		RunE: func(_ *cobra.Command, args []string) error {
			c, err := lab.Open(f.dir, f.name)
			if err != nil {
				return err
			}
			m, err := c.Machine(args[1])
			if err != nil {
				return err
			}
			start := m.Start
			for _, n := range c.Nodes() {
				if n.Name == m.Name {
					start = n.Start
				}
			}
			verbs := map[string]func(string) error{"start": start, "stop": m.Stop, "kill": m.Kill}
			verb, ok := verbs[args[0]]
			if !ok {
				return fmt.Errorf("no verb %s: want start, stop or kill", args[0])
			}
			return verb(args[2])
		},
	}
}
