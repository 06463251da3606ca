//go:build race

package nbd

const raceEnabled = true // sync.Pool drops things at random then
