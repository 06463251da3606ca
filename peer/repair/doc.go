// Package repair keeps the copies of one peer whole. Each peer sees to its own: what it is to hold (distributor.Home) and does not,
// holds in part, or holds damaged, it copies from whoever has it. Nobody plans for others, so nothing is coordinated but the ring.
//
//	repair.go   the Repairer: when it looks, what it says of itself
//	pass.go     a pass: every volume's head, its inventory, what of it is missing here; most endangered first
//	mend.go     one block: from which copies, and how it gets into the store
//	sweep.go    what is here and nothing needs any more is deleted
//	scrub.go    reading everything, round and round, to find what has rotted
//	pace.go     a bound in bytes a second
//
// What makes it safe at any time, beside any writer: the bytes below the length that a committed INode lists never change (D2);
// blocks of an open window are left to the writer; every change carries the epoch that was read and is refused below the peer's
// fence; a copy takes the place of another only when it is verified and durable (torus.OpPut); nothing is deleted but what is proven to
// be needed by nothing, now or ever (file.Inventory.Garbage), and whatever cannot be found out leaves everything as it is (D3).
package repair
