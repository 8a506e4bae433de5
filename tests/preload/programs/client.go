// SPDX-License-Identifier: MIT

// Connects to the port of loopback that is its argument, says "ready", and waits to be killed. Go
// turns keepalive on by itself, with 15 s, unless a program asks it not to, as this one does.
package main

import (
	"fmt"
	"net"
	"os"
)

func main() {
	dialer := net.Dialer{KeepAlive: -1}
	connection, err := dialer.Dial("tcp", net.JoinHostPort("127.0.0.1", os.Args[1]))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ready")
	_, _ = connection.Read(make([]byte, 1)) // as long as the peer says nothing
}
