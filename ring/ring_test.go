package ring

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/models"
)

// must unwraps what a test knows to be right.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// randomMembers returns n members with weights from 1 to 10 TiB.
func randomMembers(rng *rand.Rand, n int) []Member {
	ms := make([]Member, n)
	for i := range ms {
		var id torus.PeerID
		binary.BigEndian.PutUint64(id[:], rng.Uint64())
		binary.BigEndian.PutUint64(id[8:], rng.Uint64())
		ms[i] = Member{ID: id, Weight: (1 + rng.Uint64N(10)) << 40, Labels: map[string]string{"zone": string(rune('a' + i%3)), "host": id.Short()}}
	}
	return ms
}

// balanced fails the test if a slot lists somebody twice, or if a member's part of the first k copies of all slots is more
// than one slot off its weight's share, for any k up to the replication.
func balanced(t *testing.T, r *SlotTable) {
	t.Helper()
	n, slots := len(r.members), r.Slots()
	for s := range slots {
		row := slices.Clone(r.table[s*r.width : (s+1)*r.width])
		slices.Sort(row)
		if len(slices.Compact(row)) != r.width {
			t.Fatalf("slot %d lists a member twice", s)
		}
	}
	counts := make([]int, n)
	for k := 1; k <= min(r.replication, r.width); k++ {
		for s := range slots {
			counts[r.table[s*r.width+k-1]]++
		}
		for i, ideal := range ideals(scaled(r.members), slots, k) {
			if off := math.Abs(float64(counts[i]) - ideal); off > 1 {
				t.Fatalf("%d members, %d copies: member %d has %d slots, its weight asks for %.2f", n, k, i, counts[i], ideal)
			}
		}
	}
}

func TestBalance(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	sizes := []int{1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 16, 33, 64}
	for _, n := range sizes {
		for range 2 {
			balanced(t, must(NewSlotTable(1, 1+rng.IntN(min(n, 4)), randomMembers(rng, n), 0)))
		}
	}
	// One peer with more than its part of every block can be in every slot, no more; the others share the rest.
	ms := randomMembers(rng, 5)
	ms[2].Weight = 1 << 50
	balanced(t, must(NewSlotTable(1, 3, ms, 0)))
	// Few slots, and extreme weights.
	ms[0].Weight, ms[1].Weight = 1, math.MaxUint64
	balanced(t, must(NewSlotTable(1, 2, ms, 17)))
}

// rounding is what whole slots may add to a move, as a fraction of all copies. It shows where a share is a few slots.
const rounding = 0.001

// Adding peers moves about their share and nothing more; removing them moves what they held.
func TestChangesMoveLittle(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for _, n := range []int{3, 4, 4, 5, 5, 6, 6, 7, 8, 8, 9, 12, 20, 64} {
		for _, replication := range []int{1, 2, 3} {
			if n > 12 && replication != 3 {
				continue
			}
			members := randomMembers(rng, n+3)
			old := must(NewSlotTable(7, replication, members[:n], 0))
			for _, add := range []int{1, 3} {
				grown := must(AddPeers(old, members[n:n+add]...))
				balanced(t, grown.(*SlotTable))
				if grown.Version() != 8 || len(grown.Members()) != n+add || grown.Replication() != replication {
					t.Fatalf("grown to version %d, %d members", grown.Version(), len(grown.Members()))
				}
				share := 0.0
				for _, s := range Shares(grown) {
					for _, m := range members[n : n+add] {
						if s.ID == m.ID {
							share += s.Copies
						}
					}
				}
				if moved := Moved(old, grown); moved > 1.3*share+rounding || moved < share-1e-9 {
					t.Errorf("%d+%d members, replication %d: moved %.4f of all copies for a share of %.4f", n, add, replication, moved, share)
				}
				// And away again: what the added ones held, to the members that were there before.
				shrunk := must(RemovePeers(grown, members[n].ID))
				balanced(t, shrunk.(*SlotTable))
				gone := 0.0
				for _, s := range Shares(grown) {
					if s.ID == members[n].ID {
						gone = s.Copies
					}
				}
				if moved := Moved(grown, shrunk); moved > 1.3*gone+rounding || moved < gone-1e-9 {
					t.Errorf("%d+%d−1 members, replication %d: moved %.4f for %.4f", n, add, replication, moved, gone)
				}
			}
		}
	}
}

// More copies: those that are there stay.
func TestSetReplicationKeepsCopies(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	r2 := must(NewSlotTable(1, 2, randomMembers(rng, 9), 0))
	r3 := must(SetReplication(r2, 3))
	for _, n := range []int{3, 4, 5, 6, 8, 9, 30} {
		r2 := must(NewSlotTable(1, 2, randomMembers(rng, n), 0))
		r3 := must(SetReplication(r2, 3))
		balanced(t, r3.(*SlotTable))
		if m := Moved(r2, r3); m < 1.0/3-1e-9 || m > 1.05/3 {
			t.Errorf("%d members, from 2 to 3 copies: moved %v", n, m)
		}
	}
	if m := Moved(r3, must(SetReplication(r3, 2))); m != 0 {
		t.Errorf("from 3 to 2 copies: moved %v", m)
	}
	if _, err := SetReplication(r2, 2); !errors.Is(err, torus.ErrExists) {
		t.Errorf("no change: %v", err)
	}
	for _, n := range []int{-1, 0, torus.MaxReplication + 1} {
		if _, err := SetReplication(r2, n); !errors.Is(err, torus.ErrInvalid) {
			t.Errorf("replication %d: %v", n, err)
		}
	}
}

// Years of changes leave a table as balanced as a new one.
func TestManyChanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	pool := randomMembers(rng, 24)
	var r torus.Ring = must(NewEmpty(1, 3))
	in := map[torus.PeerID]bool{}
	for step := range 60 {
		m := pool[rng.IntN(len(pool))]
		version := r.Version()
		switch {
		case !in[m.ID]:
			r = must(AddPeers(r, m))
			in[m.ID] = true
		case rng.IntN(3) == 0:
			m.Weight = (1 + rng.Uint64N(10)) << 40
			if next, err := AddPeers(r, m); err == nil {
				r = next
			} else if errors.Is(err, torus.ErrExists) {
				continue
			}
		default:
			r = must(RemovePeers(r, m.ID))
			delete(in, m.ID)
		}
		if r.Version() != version+1 || len(r.Members()) != len(in) {
			t.Fatalf("step %d: version %d, %d members", step, r.Version(), len(r.Members()))
		}
		if s, ok := r.(*SlotTable); ok {
			balanced(t, s)
		} else if len(in) != 0 {
			t.Fatalf("step %d: %T of %d members", step, r, len(in))
		}
	}
}

func TestSmallRings(t *testing.T) {
	ms := randomMembers(rand.New(rand.NewPCG(9, 10)), 3)
	ref := torus.BlockRef{Volume: 1, INode: 2, Index: 3}
	empty := must(NewEmpty(1, 2))
	if p := empty.GetPeers(ref); len(p.Peers) != 0 || p.Replication != 2 {
		t.Errorf("empty: %v", p)
	}
	single := must(NewSingle(2, 1, ms[0]))
	if p := single.GetPeers(ref); len(p.Set(3)) != 1 || p.Peers[0] != ms[0].ID {
		t.Errorf("single: %v", p)
	}
	two := must(AddPeers(single, ms[1]))
	if two.Type() != torus.RingSlotTable || two.Version() != 3 {
		t.Errorf("single and one more: type %d version %d", two.Type(), two.Version())
	}
	balanced(t, two.(*SlotTable))
	if moved := Moved(single, two); moved > 1.3*Shares(two)[shareOf(two, ms[1].ID)].Copies {
		t.Errorf("single and one more: moved %v", moved)
	}
	none := must(RemovePeers(two, ms[0].ID, ms[1].ID))
	if none.Type() != torus.RingEmpty || none.Version() != 4 || none.Replication() != 1 {
		t.Errorf("all removed: %T version %d", none, none.Version())
	}
	if _, err := RemovePeers(two, ms[2].ID); !errors.Is(err, torus.ErrNoPeer) {
		t.Errorf("removing a stranger: %v", err)
	}
	if _, err := AddPeers(two, ms[0], ms[1]); !errors.Is(err, torus.ErrExists) {
		t.Errorf("adding members again: %v", err)
	}
	if _, err := AddPeers(two, Member{ID: ms[2].ID}); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("no weight: %v", err)
	}
	if _, err := AddPeers(two, Member{Weight: 1}); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("no identity: %v", err)
	}
	if _, err := NewEmpty(0, 2); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("version 0: %v", err)
	}
	if _, err := NewSlotTable(1, 1, nil, 0); !errors.Is(err, torus.ErrInvalid) {
		t.Errorf("no members: %v", err)
	}
}

func shareOf(r torus.Ring, id torus.PeerID) int {
	i, _ := find(Members(r), id)
	return i
}

// The sequential blocks of a volume spread over peers as the weights ask.
func TestBlocksSpread(t *testing.T) {
	r := must(NewSlotTable(1, 3, randomMembers(rand.New(rand.NewPCG(11, 12)), 10), 0))
	counts := map[torus.PeerID]int{}
	const blocks = 100000
	for i := range blocks {
		for _, id := range r.GetPeers(torus.BlockRef{Volume: 5, INode: 9, Index: torus.IndexID(i)}).Set(0) {
			counts[id]++
		}
	}
	for _, s := range Shares(r) {
		got := float64(counts[s.ID]) / (3 * blocks)
		if math.Abs(got-s.Ideal) > 0.05*s.Ideal {
			t.Errorf("%s: %.4f of the copies, its weight asks for %.4f", s.ID.Short(), got, s.Ideal)
		}
	}
}

var update = flag.Bool("update", false, "write testdata anew (a change of the golden files is a change of the format)")

// P1: the same version gives the same placement everywhere: a ring stored once answers the same for ever, and
// planning it again, on any machine, gives the same bytes.
func TestGolden(t *testing.T) {
	members := randomMembers(rand.New(rand.NewPCG(2026, 1)), 7)
	r1 := must(NewSlotTable(3, 3, members[:6], 64))
	r2 := must(RemovePeers(must(AddPeers(r1, members[6])), members[2].ID))
	for name, r := range map[string]torus.Ring{
		"empty": must(NewEmpty(1, 2)), "single": must(NewSingle(2, 1, members[0])), "slots": r1, "changed": r2,
	} {
		file := filepath.Join("testdata", name+".ring.hex")
		stored := must(r.Marshal())
		if *update {
			if err := os.WriteFile(file, []byte(hex.EncodeToString(stored)+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		golden := must(hex.DecodeString(strings.TrimSpace(string(text))))
		if string(golden) != string(stored) {
			t.Errorf("%s: planned anew it differs from %s", name, file)
		}
		old := must(Decode(golden))
		if again := must(old.Marshal()); string(again) != string(golden) {
			t.Errorf("%s: decoded and marshalled again it differs", name)
		}

		var lookups strings.Builder
		for i := range 32 {
			ref := torus.BlockRef{Type: torus.BlockType(i % 2), Volume: torus.VolumeID(i / 2), INode: torus.INodeID(i * i), Index: torus.IndexID(1 << i)}
			fmt.Fprintf(&lookups, "%s", ref)
			for _, p := range old.GetPeers(ref).Peers {
				fmt.Fprintf(&lookups, " %s", p.Short())
			}
			lookups.WriteString("\n")
		}
		file = filepath.Join("testdata", name+".lookups")
		if *update {
			if err := os.WriteFile(file, []byte(lookups.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want := string(must(os.ReadFile(file))); lookups.String() != want {
			t.Errorf("%s: lookups differ from %s:\n%s", name, file, lookups.String())
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	good := func() *models.Ring {
		var m models.Ring
		r := must(NewSlotTable(1, 2, randomMembers(rand.New(rand.NewPCG(13, 14)), 4), 8))
		if err := proto.Unmarshal(must(r.Marshal()), &m); err != nil {
			t.Fatal(err)
		}
		return &m
	}
	for name, c := range map[string]struct {
		spoil func(*models.Ring)
		want  error
	}{
		"type":           {func(m *models.Ring) { m.Type = 99 }, torus.ErrNotSupported},
		"version":        {func(m *models.Ring) { m.Version = 0 }, torus.ErrInvalid},
		"replication":    {func(m *models.Ring) { m.Replication = 1 << 31 }, torus.ErrInvalid},
		"no replication": {func(m *models.Ring) { m.Replication = 0 }, torus.ErrInvalid},
		"member out":     {func(m *models.Ring) { m.Table[0], m.Table[1] = 0, 4 }, torus.ErrInvalid},
		"member twice":   {func(m *models.Ring) { copy(m.Table[2:4], m.Table[:2]) }, torus.ErrInvalid},
		"short table":    {func(m *models.Ring) { m.Table = m.Table[:len(m.Table)-2] }, torus.ErrInvalid},
		"slots":          {func(m *models.Ring) { m.Slots = 1 << 31 }, torus.ErrInvalid},
		"no slots":       {func(m *models.Ring) { m.Slots, m.Table = 0, nil }, torus.ErrInvalid},
		"width":          {func(m *models.Ring) { m.Width = 5 }, torus.ErrInvalid},
		"no width":       {func(m *models.Ring) { m.Width, m.Table = 0, nil }, torus.ErrInvalid},
		"order":          {func(m *models.Ring) { m.Members[0], m.Members[1] = m.Members[1], m.Members[0] }, torus.ErrInvalid},
		"uuid":           {func(m *models.Ring) { m.Members[0].Uuid = "x" }, torus.ErrInvalid},
		"weight":         {func(m *models.Ring) { m.Members[0].Weight = 0 }, torus.ErrInvalid},
		"single":         {func(m *models.Ring) { m.Type = uint32(torus.RingSingle) }, torus.ErrInvalid},
		"empty":          {func(m *models.Ring) { m.Type = uint32(torus.RingEmpty) }, torus.ErrInvalid},
	} {
		m := good()
		c.spoil(m)
		if _, err := Decode(must(proto.Marshal(m))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	if _, err := Decode(must(proto.Marshal(good()))); err != nil {
		t.Error(err)
	}
	if _, err := Decode([]byte("nonsense")); !errors.Is(err, torus.ErrInvalid) {
		t.Error(err)
	}
}

func FuzzDecode(f *testing.F) {
	rng := rand.New(rand.NewPCG(15, 16))
	f.Add(must(must(NewEmpty(1, 2)).Marshal()))
	f.Add(must(must(NewSingle(1, 1, randomMembers(rng, 1)[0])).Marshal()))
	f.Add(must(must(NewSlotTable(1, 2, randomMembers(rng, 3), 4)).Marshal()))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if err != nil {
			if !errors.Is(err, torus.ErrInvalid) && !errors.Is(err, torus.ErrNotSupported) {
				t.Fatalf("%v wraps no sentinel", err)
			}
			return
		}
		stored := must(r.Marshal())
		again := must(Decode(stored))
		if string(must(again.Marshal())) != string(stored) {
			t.Fatal("marshal, decode, marshal differs")
		}
		ref := torus.BlockRefFromBytes(append(b, make([]byte, torus.BlockRefByteSize)...))
		p := r.GetPeers(ref)
		for i, id := range p.Peers {
			if !r.Members().Has(id) || p.Peers[:i].Has(id) {
				t.Fatalf("%v answers %v", ref, p.Peers)
			}
		}
	})
}

func TestGetPeersDoesNotAllocate(t *testing.T) {
	r := must(NewSlotTable(1, 3, randomMembers(rand.New(rand.NewPCG(17, 18)), 16), 0))
	ref := torus.BlockRef{Volume: 1}
	if n := testing.AllocsPerRun(100, func() { ref.Index++; sink = r.GetPeers(ref) }); n != 0 {
		t.Errorf("%v allocations a lookup", n)
	}
	stored := must(r.Marshal())
	if len(stored) > 36<<10 {
		t.Errorf("a ring of 16 members takes %d bytes", len(stored))
	}
}

var sink torus.PeerPermutation

func BenchmarkGetPeers(b *testing.B) {
	r := must(NewSlotTable(1, 3, randomMembers(rand.New(rand.NewPCG(17, 18)), 16), 0))
	ref := torus.BlockRef{Volume: 1, INode: 2}
	b.ReportAllocs()
	for b.Loop() {
		ref.Index++
		sink = r.GetPeers(ref)
	}
}

func BenchmarkPlan(b *testing.B) {
	for _, n := range []int{3, 64, 512} {
		members := randomMembers(rand.New(rand.NewPCG(19, 20)), n+1)
		b.Run(fmt.Sprintf("new-%d", n), func(b *testing.B) {
			for b.Loop() {
				must(NewSlotTable(1, 3, members[:n], 0))
			}
		})
		r := must(NewSlotTable(1, 3, members[:n], 0))
		b.Run(fmt.Sprintf("add-to-%d", n), func(b *testing.B) {
			for b.Loop() {
				must(AddPeers(r, members[n]))
			}
		})
	}
}

func BenchmarkDecode(b *testing.B) {
	stored := must(must(NewSlotTable(1, 3, randomMembers(rand.New(rand.NewPCG(17, 18)), 16), 0)).Marshal())
	b.ReportAllocs()
	for b.Loop() {
		must(Decode(stored))
	}
}
