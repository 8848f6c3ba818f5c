// SPDX-License-Identifier: Apache-2.0

// Firstpacket is a program for pods that sends from its first instruction on: datagrams and connection attempts to addresses that policy
// denies, as fast as it can, and connection attempts to addresses that policy allows, until each has succeeded. Then it prints one JSON
// object with the times, and waits. It never succeeds with a denied address if the network keeps its promise; who counts is the target.
//
// A machine that starts many pods at once may give one of them no processor for a while. A clock in the program notices that, so that it
// can be told from a network that is late.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"
)

// report is what is printed.
type report struct {
	Sent    int               // datagrams and connection attempts to denied addresses
	Reached []string          // denied addresses that answered
	Allowed map[string]moment // the first success with each allowed address
	Missed  []string          // allowed addresses that did not answer in time
}

// moment is a time after the start, and how much of it the program did not run.
type moment struct {
	After, Stalled time.Duration
}

func main() {
	start := time.Now()
	denied := flag.String("denied", "", "addresses with ports, separated by commas")
	allowed := flag.String("allowed", "", "addresses with ports, separated by commas")
	length := flag.Duration("for", 3*time.Second, "how long to send to denied addresses")
	patience := flag.Duration("patience", 20*time.Second, "how long to try allowed addresses")
	flag.Parse()

	cpu := &processor{current: start}
	go cpu.watch()
	r := report{Allowed: map[string]moment{}}
	var lock sync.Mutex
	var wg sync.WaitGroup
	for _, address := range strings.Split(*denied, ",") {
		wg.Go(func() {
			sent, reached := flood(address, start.Add(*length))
			lock.Lock()
			defer lock.Unlock()
			r.Sent += sent
			if reached {
				r.Reached = append(r.Reached, address)
			}
		})
	}
	for _, address := range strings.Split(*allowed, ",") {
		wg.Go(func() {
			ok := connect(address, start.Add(*patience))
			at := moment{After: time.Since(start), Stalled: cpu.stalled()}
			lock.Lock()
			defer lock.Unlock()
			if ok {
				r.Allowed[address] = at
			} else {
				r.Missed = append(r.Missed, address)
			}
		})
	}
	wg.Wait()
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	<-ended // a program that ends by itself would be started again
}

// processor notices when the program wanted to run and did not.
type processor struct {
	mu      sync.Mutex
	missed  time.Duration // in all naps before this one
	current time.Time     // when this nap began
}

const nap, usual = 5 * time.Millisecond, 15 * time.Millisecond

// watch sleeps again and again, and adds up by how much it is woken too late.
func (p *processor) watch() {
	for {
		time.Sleep(nap)
		p.mu.Lock()
		p.missed += tooLong(p.current)
		p.current = time.Now()
		p.mu.Unlock()
	}
}

// stalled returns the time that was missed until now, also of a nap that should have ended: whoever asks may be awake before the watch is.
func (p *processor) stalled() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.missed + tooLong(p.current)
}

func tooLong(start time.Time) time.Duration {
	if d := time.Since(start); d > usual {
		return d - nap
	}
	return 0
}

// flood sends to one address until the deadline: a connection attempt, and datagrams while it lasts.
func flood(address string, deadline time.Time) (sent int, reached bool) {
	udp, err := net.Dial("udp", address)
	if err != nil {
		return 0, false
	}
	defer udp.Close()
	for time.Now().Before(deadline) {
		done := make(chan bool, 1)
		go func() {
			c, err := net.DialTimeout("tcp", address, time.Second)
			if err == nil {
				_ = c.Close()
			}
			done <- err == nil
		}()
		sent++
	attempt:
		for {
			select {
			case ok := <-done:
				reached = reached || ok
				break attempt
			default:
				if _, err := udp.Write([]byte("leak")); err == nil {
					sent++
				}
				if sent > 50 {
					time.Sleep(2 * time.Millisecond) // many of these programs share a machine
				}
			}
		}
	}
	return sent, reached
}

// connect tries one address until it answers.
func connect(address string, deadline time.Time) bool {
	for time.Now().Before(deadline) {
		c, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err == nil {
			_ = c.Close()
			return true
		}
		time.Sleep(5 * time.Millisecond)
	}
	return false
}
