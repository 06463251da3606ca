package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/coreos/torus"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/node"
)

// capacityFlag is --size: 20GiB, or 80% of the file system.
type capacityFlag struct {
	node.Capacity
	text string
}

func (c *capacityFlag) Set(text string) error {
	number, percent := strings.CutSuffix(strings.TrimSpace(text), "%")
	if !percent {
		n, err := cli.ParseSize(text)
		if err != nil {
			return err
		}
		if n == 0 {
			return fmt.Errorf("a peer of size 0 stores nothing: %w\ngive a size as 20GiB, or 80%% of the file system", torus.ErrInvalid)
		}
		c.Capacity, c.text = node.Capacity{Bytes: n}, text
		return nil
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || !(f > 0 && f <= 100) {
		return fmt.Errorf("size %q: %w\ngive a share of the file system from 1%% to 100%%, or a size as 20GiB", text, torus.ErrInvalid)
	}
	c.Capacity, c.text = node.Capacity{Percent: f}, text
	return nil
}

func (c *capacityFlag) String() string { return c.text }

// Type is the name of the value in help texts.
func (c *capacityFlag) Type() string { return "SIZE|N%" }
