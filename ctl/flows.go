// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/margay-cni/margay/pkg/flow"
)

type flowList struct {
	Flows []flow.Flow `json:"flows"`
	// Omitted is how many more flows there are, left out by --limit.
	Omitted int `json:"omitted"`

	numeric bool
}

func newFlows(a *app) *cobra.Command {
	var (
		pod     string
		query   flow.Query
		numeric bool
	)
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "List the flows in the flow table, latest packet first",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			s := a.source()
			defer s.close()
			m, err := s.openMap("flows")
			if err != nil {
				return err
			}
			names := a.names()
			if pod != "" {
				if query.Addrs, err = podAddrs(names, pod); err != nil {
					return err
				}
			}
			flows, omitted, err := flow.List(m, query, names)
			if err != nil {
				return err
			}
			if flows == nil {
				flows = []flow.Flow{}
			}
			return a.show(flowList{flows, omitted, numeric})
		},
	}
	cmd.Flags().StringVar(&pod, "pod", "", "only flows of this pod (namespace/name)")
	cmd.Flags().IntVar(&query.Limit, "limit", 100, "show at most so many; 0 = all")
	cmd.Flags().BoolVarP(&numeric, "numeric", "n", false, "show addresses instead of pod names")
	return cmd
}

// podAddrs returns the addresses of a pod of this node.
func podAddrs(names *flow.Names, pod string) ([]netip.Addr, error) {
	addrs := names.PodAddrs(pod)
	if len(addrs) == 0 {
		return nil, fmt.Errorf("pod %s is not known on this node: margayctl endpoints lists those that are", pod)
	}
	return addrs, nil
}

func (l flowList) print(w io.Writer) {
	if len(l.Flows) == 0 {
		fmt.Fprintln(w, "no flows")
		return
	}
	t := newTable("PROTO", "FROM", "TO", "BACKEND", "STATE", ">AGE", "VERDICT", "SERVICE", "RULE")
	for _, f := range l.Flows {
		if l.numeric {
			f.SourcePod, f.DestinationPod, f.BackendPod = "", "", ""
		}
		backend := "-"
		if f.Backend != nil {
			backend = end(f.Protocol, *f.Backend, f.BackendPod)
		}
		from := end(f.Protocol, f.Source, f.SourcePod)
		if f.TranslatedSource != nil {
			from += " as " + end(f.Protocol, *f.TranslatedSource, "")
		}
		verdict := "allowed"
		if f.Denied {
			verdict = "denied"
		}
		t.add(f.Protocol, from, end(f.Protocol, f.Destination, f.DestinationPod), backend, stateText(f),
			span(time.Duration(f.AgeSeconds)*time.Second), verdict, named(f.Service, f.ServiceID), named(f.Rule, f.RuleID))
	}
	t.print(w)
	if l.Omitted > 0 {
		fmt.Fprintf(w, "and %d more; --limit 0 shows all\n", l.Omitted)
	}
}

// stateText adds what tells two flows of the same addresses apart: the identifier of an ICMP echo.
func stateText(f flow.Flow) string {
	state := f.State
	if strings.HasPrefix(f.Protocol, "ICMP") {
		state = fmt.Sprintf("echo %d", f.Source.Port())
	}
	if !f.Paired {
		state += ", one way"
	}
	return state
}

// named returns the name, or the number where the name is not known, or a dash for 0.
func named(name string, id uint32) string {
	if id == 0 {
		return "-"
	}
	return cmp.Or(name, fmt.Sprint(id))
}
