// Command torusd is a storage node of a Torus cluster, or, as torusd dev, a whole cluster in one process.
package main

import "github.com/coreos/torus/cmd/internal/cli"

func main() { cli.Main(rootCommand()) }
