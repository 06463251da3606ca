//go:build race

package sim

// seeds is how many schedules are played unless TORUS_SEEDS says otherwise; the race detector makes each some ten times as long.
const seeds = 100
