package ring

import (
	"encoding/binary"
	"math/bits"

	"github.com/coreos/torus"
)

// mix is a bijection of 64-bit words in which every bit of the input changes every bit of the output with
// odds near one half (the finaliser of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
func mix(x uint64) uint64 {
	x ^= x >> 30
	x *= 0xbf58476d1ce4e5b9
	x ^= x >> 27
	x *= 0x94d049bb133111eb
	return x ^ x>>31
}

// hash2 hashes two words; gamma keeps zeros from hashing to zero.
func hash2(a, b uint64) uint64 {
	const gamma = 0x9e3779b97f4a7c15
	return mix(mix(a+gamma) ^ b + gamma)
}

// hashRef hashes the 24 bytes of a reference, as three big-endian words. Part of the format: what it
// answers for a reference never changes.
func hashRef(r torus.BlockRef) uint64 {
	return hash2(hash2(uint64(r.Type)<<40|uint64(r.Volume), uint64(r.INode)), uint64(r.Index))
}

// slot scales a hash to [0, n): its high bits count, so slots are equal, adjoining parts of the hash's range.
func slot(h uint64, n int) int {
	hi, _ := bits.Mul64(h, uint64(n))
	return int(hi)
}

// lot is what member id draws for slot s: -log2 of a number in (0, 1) that the two determine, in units of
// 2⁻³². Divided by a weight, the least lot wins with odds in proportion to the weight (weighted rendezvous hashing).
// In integers, since floating point need not agree between architectures.
func lot(s int, id torus.PeerID) uint64 {
	h := hash2(uint64(s), hash2(binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:])))
	return 64<<32 - log2(h|1)
}

// log2 returns the logarithm of x > 0 in units of 2⁻³², rounded down.
func log2(x uint64) uint64 {
	n := bits.Len64(x) - 1
	r := uint64(n)
	m := x << (63 - n) // the mantissa, in [1, 2), 63 bits behind the point
	for range 32 {
		hi, lo := bits.Mul64(m, m) // [1, 4), 126 bits behind the point
		r <<= 1
		if hi>>63 == 1 {
			r |= 1
			m = hi
		} else {
			m = hi<<1 | lo>>63
		}
	}
	return r
}

// lighter reports whether a/wa < b/wb. Weights are below 2⁴⁰.
func lighter(a, wa, b, wb uint64) bool {
	h1, l1 := bits.Mul64(a, wb)
	h2, l2 := bits.Mul64(b, wa)
	return h1 < h2 || h1 == h2 && l1 < l2
}
