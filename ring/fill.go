package ring

import (
	"math/bits"
	"slices"
)

// none is a vacant place in a table being filled.
const none = 1<<16 - 1

// fill completes and balances a table, in place; start may be nil for a new one.
//
// It goes column by column. For every k up to replication, the first k columns together give each member its share of
// k copies by weight, to within one slot; so volumes with fewer copies are balanced, too. The fall-backs behind are
// balanced as far as that moves no copy, so that raising the replication moves next to nothing. What is placed stays unless its member has
// more than its share: changing a ring moves what must move.
// Which slots a member gets is up to weighted rendezvous hashing.
func fill(members []Member, replication, slots, width int, start []uint16) []uint16 {
	if start == nil {
		start = vacant(slots, width)
	}
	f := &filler{
		slots: slots, width: width, copies: min(replication, width), table: start,
		weights: scaled(members),
		lots:    make([]uint64, slots*len(members)),
		held:    make([]int, len(members)),
	}
	for s := range slots {
		for i := range members {
			f.lots[s*len(members)+i] = lot(s, members[i].ID)
		}
	}
	for k := range width {
		f.column(k)
	}
	return f.table
}

type filler struct {
	slots, width int
	copies       int // the columns that say where data is
	table        []uint16
	weights      []uint64
	lots         []uint64 // slots × members
	held         []int    // slots each member has in the columns done so far

	// For the present column:
	count []int // slots each member has
	want  []int // and should have
}

func (f *filler) members() int { return len(f.weights) }

func (f *filler) lot(s, i int) uint64 { return f.lots[s*f.members()+i] }

func (f *filler) over(i int) bool { return f.count[i] > f.want[i] }

func (f *filler) under(i int) bool { return f.count[i] < f.want[i] }

// taken reports whether slot s lists member i before column k.
func (f *filler) taken(s, k, i int) bool {
	return slices.Contains(f.table[s*f.width:s*f.width+k], uint16(i))
}

// put makes i the member of slot s in column k. If i was further back, the two change places.
func (f *filler) put(s, k, i int) {
	row := f.table[s*f.width : (s+1)*f.width]
	was := row[k]
	if j := slices.Index(row[k+1:], uint16(i)); j >= 0 {
		row[k+1+j] = was
	}
	row[k] = uint16(i)
	f.count[i]++
	if was != none {
		f.count[was]--
	}
}

func (f *filler) column(k int) {
	f.count = make([]int, f.members())
	for s := range f.slots {
		if i := f.table[s*f.width+k]; i != none {
			f.count[i]++
		}
	}
	f.want = f.quotas(k)
	f.fillVacant(k)
	f.shift(k)
	for f.chain(k) || f.exchange(k) {
	}
	for i, n := range f.count {
		f.held[i] += n
	}
}

// fillVacant gives each vacant place to the member with the best lot among those that lack slots.
func (f *filler) fillVacant(k int) {
	for s := range f.slots {
		if f.table[s*f.width+k] != none {
			continue
		}
		i := f.best(s, k, true)
		if i < 0 {
			i = f.best(s, k, false) // chains will mend it
		}
		f.put(s, k, i)
	}
}

func (f *filler) best(s, k int, lacking bool) int {
	best := -1
	for i := range f.members() {
		if lacking && !f.under(i) || f.taken(s, k, i) {
			continue
		}
		if best < 0 || lighter(f.lot(s, i), f.weights[i], f.lot(s, best), f.weights[best]) {
			best = i
		}
	}
	return best
}

// shift moves slots from members with too many to members with too few: first where the latter are listed further back, as
// changing places costs no copying, then the best lots.
func (f *filler) shift(k int) {
	var order []int
	for i := range f.members() {
		if !f.under(i) {
			continue
		}
		order = order[:0]
		for s := range f.slots {
			if f.over(int(f.table[s*f.width+k])) && !f.taken(s, k, i) {
				order = append(order, s)
			}
		}
		slices.SortFunc(order, func(a, b int) int {
			if ta, tb := f.taken(a, f.width, i), f.taken(b, f.width, i); ta != tb {
				if ta {
					return -1
				}
				return 1
			}
			if la, lb := f.lot(a, i), f.lot(b, i); la != lb {
				if la < lb {
					return -1
				}
				return 1
			}
			return a - b
		})
		for _, s := range order {
			if !f.under(i) {
				break
			}
			if f.over(int(f.table[s*f.width+k])) {
				f.put(s, k, i)
			}
		}
	}
}

// chain settles a case that shift cannot: every slot of the members with too many lists those with too few
// already, so that x must take over a slot of one, and give up another to the next. Breadth first: the shortest chain moves least.
// It reports whether it found one.
func (f *filler) chain(k int) bool {
	type step struct{ from, slot int }
	via := make([]step, f.members())
	var queue []int
	for i := range via {
		via[i] = step{-1, -1}
		if f.over(i) {
			queue = append(queue, i)
		}
	}
	if queue == nil {
		return false
	}
	slots := make([][]int, f.members()) // of each member in this column
	for s := range f.slots {
		i := f.table[s*f.width+k]
		slots[i] = append(slots[i], s)
	}
	for len(queue) > 0 {
		x := queue[0]
		queue = queue[1:]
		for _, s := range slots[x] {
			for y := range f.members() {
				if y == x || via[y].slot >= 0 || f.over(y) || f.taken(s, k, y) {
					continue
				}
				via[y] = step{x, s}
				if !f.under(y) {
					queue = append(queue, y)
					continue
				}
				for via[y].slot >= 0 {
					f.put(via[y].slot, k, y)
					y = via[y].from
				}
				return true
			}
		}
	}
	return false
}

// exchange settles what no chain can: the earlier columns left slots that lack two members of which each should be
// everywhere. It picks a slot a of a member with too many, a slot b that lacks i, a member with too few, and exchanges between
// the two, column by column, what frees a of i. Columns keep their counts, so all before k stay balanced.
// The exchange is a Kempe chain in an edge colouring of columns × members by slots, which by König's theorem always ends.
func (f *filler) exchange(k int) bool {
	i := 0
	for i < f.members() && !f.under(i) {
		i++
	}
	if i == f.members() {
		return false
	}
	var best []int // columns to exchange
	bestA, bestB := -1, -1
	tries := 0
	for a := range f.slots {
		if !f.over(int(f.table[a*f.width+k])) {
			continue
		}
		for b := range f.slots {
			if f.taken(b, k+1, i) {
				continue
			}
			cols := f.path(a, b, k, i)
			if k >= f.copies && slices.ContainsFunc(cols, func(c int) bool { return c < f.copies }) {
				continue // not worth moving a copy
			}
			if bestA < 0 || len(cols) < len(best) {
				best, bestA, bestB = cols, a, b
			}
			if len(best) == 1 {
				break
			}
		}
		if tries++; len(best) == 1 || tries == 16 {
			break
		}
	}
	if bestA < 0 {
		return false
	}
	ra, rb := f.table[bestA*f.width:(bestA+1)*f.width], f.table[bestB*f.width:(bestB+1)*f.width]
	for _, c := range best {
		ra[c], rb[c] = rb[c], ra[c]
	}
	f.put(bestA, k, i)
	for _, row := range [][]uint16{ra, rb} {
		for j := k + 1; j < f.width; j++ {
			if slices.Contains(row[:k+1], row[j]) {
				row[j] = none // it moved forward; its own column will be refilled
			}
		}
	}
	return true
}

// path returns the columns before k that slots a and b must exchange so that a has no more of member i, which b lacks,
// and neither has anybody twice.
func (f *filler) path(a, b, k, i int) []int {
	ra, rb := f.table[a*f.width:a*f.width+k], f.table[b*f.width:b*f.width+k]
	var cols []int
	for x := uint16(i); ; {
		c := slices.Index(ra, x)
		if c < 0 {
			return cols
		}
		cols = append(cols, c)
		x = rb[c]
	}
}

// quotas returns how many slots each member should have in column k: its share of k+1 copies less what it has.
// Shares are rounded so as to keep what is in place: which way is within the tolerance of one slot anyhow.
func (f *filler) quotas(k int) []int {
	n := f.members()
	whole, rest := shares(f.weights, f.slots, k+1)
	total := 0
	target := make([]int, n)
	for i := range target {
		target[i] = max(whole[i], f.held[i])
		total += target[i]
	}
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	has := func(i int) bool { return f.held[i]+f.count[i] > whole[i] }
	slices.SortStableFunc(order, func(a, b int) int {
		if ha, hb := has(a), has(b); ha != hb {
			if ha {
				return -1
			}
			return 1
		}
		switch {
		case rest[a] > rest[b]:
			return -1
		case rest[a] < rest[b]:
			return 1
		}
		return 0
	})
	// Too few so far: one more each, in that order. Too many, since something rounded up before: one less each, in reverse.
	for left := f.slots*(k+1) - total; left != 0; {
		before := left
		if left > 0 {
			for _, i := range order {
				if left > 0 && target[i] < f.slots {
					target[i]++
					left--
				}
			}
		} else {
			for _, i := range slices.Backward(order) {
				if left < 0 && target[i] > f.held[i] {
					target[i]--
					left++
				}
			}
		}
		if left == before {
			break
		}
	}
	for i := range target {
		target[i] -= f.held[i]
	}
	return target
}

// scaled returns the weights as numbers below 2⁴⁰, so that sums and products of them fit.
func scaled(members []Member) []uint64 {
	var most uint64
	for _, m := range members {
		most = max(most, m.Weight)
	}
	shift := max(bits.Len64(most)-40, 0)
	w := make([]uint64, len(members))
	for i, m := range members {
		w[i] = max(m.Weight>>shift, 1)
	}
	return w
}

// capped finds who is so heavy that it belongs into every slot: a block's copies are on different peers, so
// nobody can hold more than one in copies. What is left, quota slots and sum weight, is the others' to share.
func capped(weights []uint64, slots, copies int) (full []bool, quota, sum uint64) {
	full = make([]bool, len(weights))
	quota = uint64(slots) * uint64(min(copies, len(weights)))
	for _, w := range weights {
		sum += w
	}
	for again := true; again; {
		again = false
		for i, w := range weights {
			// w/sum of quota is slots or more
			if full[i] || sum == 0 {
				continue
			}
			h1, l1 := bits.Mul64(quota, w)
			h2, l2 := bits.Mul64(uint64(slots), sum)
			if h1 > h2 || h1 == h2 && l1 >= l2 {
				full[i], again = true, true
				quota -= uint64(slots)
				sum -= w
			}
		}
	}
	return full, quota, sum
}

// shares returns every member's share of slots × copies places, as a whole number and the rest in units of 2⁻⁶⁴.
func shares(weights []uint64, slots, copies int) (whole []int, rest []uint64) {
	full, quota, sum := capped(weights, slots, copies)
	whole, rest = make([]int, len(weights)), make([]uint64, len(weights))
	for i, w := range weights {
		if full[i] {
			whole[i] = slots
			continue
		}
		hi, lo := bits.Mul64(quota, w)
		q, r := bits.Div64(hi, lo, sum)
		whole[i] = int(q)
		rest[i], _ = bits.Div64(r, 0, sum)
	}
	return whole, rest
}

// ideals is shares for people.
func ideals(weights []uint64, slots, copies int) []float64 {
	whole, rest := shares(weights, slots, copies)
	x := make([]float64, len(weights))
	for i := range x {
		x[i] = float64(whole[i]) + float64(rest[i])/(1<<64)
	}
	return x
}
