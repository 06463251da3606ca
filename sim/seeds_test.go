//go:build !race

package sim

// seeds is how many schedules are played unless TORUS_SEEDS says otherwise.
const seeds = 2500
