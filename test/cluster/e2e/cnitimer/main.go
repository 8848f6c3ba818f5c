// SPDX-License-Identifier: Apache-2.0

// Cnitimer stands in the place of a CNI plugin, whose name it has: it runs the program NAME.timed beside it with its own input and output,
// and writes down how long that took, one JSON object in a line of /run/cnitimer.log.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// Entry is one run of the plugin. The time is from before the process is made until it has ended, as the runtime would see it.
type Entry struct {
	Command  string
	Start    time.Time
	Duration time.Duration
	Code     int
}

func main() { os.Exit(run()) }

func run() int {
	self, err := os.Executable()
	if err != nil {
		return fail(err)
	}
	cmd := exec.Command(self + ".timed")
	cmd.Args = os.Args
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	e := Entry{Command: os.Getenv("CNI_COMMAND"), Start: time.Now()}
	err = cmd.Run()
	e.Duration = time.Since(e.Start)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		e.Code = exit.ExitCode()
	} else if err != nil {
		return fail(err)
	}
	line, err := json.Marshal(e)
	if err != nil {
		return fail(err)
	}
	f, err := os.OpenFile("/run/cnitimer.log", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	if _, err := f.Write(append(line, '\n')); err != nil { // one write: runs of one moment do not mix
		return fail(err)
	}
	return e.Code
}

// fail reports a fault of this program, as an error of the CNI specification.
func fail(err error) int {
	fmt.Printf(`{"cniVersion": "1.0.0", "code": 999, "msg": %q}`, "cnitimer: "+err.Error())
	return 1
}
