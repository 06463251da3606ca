package main

// The names are those of the protocol's model where it has the same mistake.
var mutants = []Mutant{
	{Name: "none", Rule: "the product as it is"},

	// Fences.
	{
		Name: "fence-volatile", Rule: "a fence is answered without being persisted", File: "peer/fences.go",
		Edits: []Edit{{"	_, err := j.f.WriteAt(b, int64(j.entries+1)*entrySize)\n	if err == nil {\n		err = j.f.Datasync()\n	}\n", "	var err error\n"}},
	},
	{
		Name: "fence-not-synced", Rule: "a fence is written, not synced", File: "peer/fences.go",
		Edits: []Edit{{"	if err == nil {\n		err = j.f.Datasync()\n	}\n	if err != nil {\n		j.broken = true", "	if err != nil {\n		j.broken = true"}},
	},
	{
		Name: "append-unfenced", Rule: "appends are not checked against the fence", File: "peer/service.go",
		Edits: []Edit{{"	checked := r.Op.Mutating() ||", "	checked := r.Op.Mutating() && r.Op != torus.OpAppend ||"}},
	},
	{
		Name: "fence-no-drain", Rule: "fence check and append are not atomic: an append checked before the fence lands after its answer", File: "peer/service.go",
		Edits: []Edit{{"	if r.Op.Mutating() {\n		f.enlist()\n	}\n", "	if r.Op == torus.OpAppend {\n		s.l.After(2e6, func() { s.store.Submit(r) })\n		return\n	}\n	if r.Op.Mutating() {\n		f.enlist()\n	}\n"}},
	},
	{
		Name: "read-without-fence", Rule: "a recovery reads the tails and fences nothing", File: "file/attach.go",
		Edits: []Edit{{"Op: torus.OpFence, Epoch: f.epoch, Peer: p, Len: uint32(hi - lo),", "Op: torus.OpFence, Epoch: a.old.Epoch, Peer: p, Len: uint32(hi - lo),"}},
	},
	{
		Name: "repair-unfenced", Rule: "a recovery's copy counts at a peer that has not promised its epoch", File: "file/attach.go",
		Edits: []Edit{{"!f.dist.Healthy(p) || !a.peers[p].answered", "!f.dist.Healthy(p)"}},
	},

	// Acknowledgement.
	{
		Name: "roll-unregistered", Rule: "the log goes on in blocks that are not registered yet", File: "file/window.go",
		Edits: []Edit{{"		err := f.commit(t, func(s *models.VolumeState) error {\n			s.Open.Spans = append(s.Open.Spans, span)", "		f.win.spans = append(f.win.spans, span)\n		f.pump()\n		err := f.commit(t, func(s *models.VolumeState) error {\n			s.Open.Spans = append(s.Open.Spans, span)"}},
	},
	{
		Name: "ack-r-minus-1", Rule: "a write is acknowledged when one replica has it", File: "file/send.go",
		Edits: []Edit{{"b.stored, b.synced = min(b.stored, r.stored), min(b.synced, r.synced)", "b.synced = min(b.synced, r.synced)"}},
	},
	{
		Name: "flush-r-minus-1", Rule: "a flush is acknowledged when one replica has synced", File: "file/flush.go",
		Edits: []Edit{{"			if b.replicas[i].synced >= n {", "			if i > 0 {\n				b.replicas[i].synced = n\n			}\n			if b.replicas[i].synced >= n {"}},
	},
	{
		Name: "ack-out-of-order", Rule: "a write is acknowledged while a lower one is in flight in another block", File: "file/ack.go",
		Edits: []Edit{{"		if r.end() > r.blk.stored {\n			break\n		}\n", "		if r.end() > r.blk.stored {\n			for s := f.held + 1; s <= f.sent; s++ {\n				if x := f.rec(s); x.end() <= x.blk.stored {\n					reqs := x.reqs\n					x.reqs = nil\n					for _, q := range reqs {\n						q.Finish(nil)\n					}\n				}\n			}\n			break\n		}\n"}},
	},
	{
		Name: "roll-keeps-held", Rule: "after a replica failed, what was acknowledged in its block is not sent again", File: "file/send.go",
		Edits: []Edit{{"	from := f.flushed + 1\n	for from <= f.sent", "	from := f.held + 1\n	for from <= f.sent"}},
		More:  map[string][]Edit{"file/flush.go": {{"		if r.end() > r.blk.synced {\n			break", "		if r.end() > r.blk.synced && !r.blk.dead {\n			break"}}},
	},

	// Flushes.
	{
		Name: "flush-no-sync", Rule: "a peer answers a sync without making one", File: "storage/sync.go",
		Edits: []Edit{{"	if x.open < 0 || r.Len <= d.opens[x.open].durable {", "	if x.open < 0 || r.Len <= x.length {"}},
	},
	{
		Name: "sync-no-length", Rule: "a sync succeeds at a peer that holds less", File: "storage/sync.go",
		Edits: []Edit{{"	if !ok || r.Len > d.slots[s].length && !d.lost(s) {", "	if !ok {"}},
	},
	{
		Name: "flush-open-block-only", Rule: "a flush does not sync older blocks with unsynced records", File: "file/flush.go",
		Edits: []Edit{
			{"			if b.replicas[i].synced >= n {", "			if b.closed || b.replicas[i].synced >= n {"},
			{"		if r.end() > r.blk.synced {\n			break", "		if r.end() > r.blk.synced && !r.blk.closed {\n			break"},
		},
	},
	{
		Name: "flush-completed-only", Rule: "a flush does not wait for acknowledged records that have to be sent again", File: "file/flush.go",
		Edits: []Edit{{"	if f.acked <= f.flushed {\n		r.Finish(nil)", "	if f.held <= f.flushed {\n		r.Finish(nil)"}},
	},

	// Storage.
	{
		Name: "sync-before-landing", Rule: "a sync is answered by an fdatasync that began while some of it was in the air", File: "storage/sync.go",
		Edits:   []Edit{{"			o.flying = min(x.length, d.unwritten(s))\n", "			o.flying = x.length\n"}, {"		return r.Len <= d.unwritten(s)\n", "		return true\n"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "again-in-the-air", Rule: "an append that is sent again is acknowledged while the first one is being written", File: "storage/append.go",
		Edits:   []Edit{{"			if d.owing(s) && d.flying(s, r.Off+uint32(len(again))) {\n", "			if d.flying(s, 0) {\n"}},
		Package: "./storage", Test: "^TestFlight$",
	},
	{
		Name: "ack-in-the-air", Rule: "a small append is acknowledged before a large one in front of it is written", File: "storage/append.go",
		Edits: []Edit{{"	flies := !durable && (len(data) >= d.bulk || found && d.owing(s))\n", "	flies := !durable && len(data) >= d.bulk\n"}},
	},
	{
		Name: "stage-forgotten", Rule: "what was staged and acknowledged is not looked for after the end of the process", File: "storage/stage.go",
		Edits:   []Edit{{"	for _, p := range r.staged[r.d.slots[s].key] {", "	for _, p := range r.staged[r.d.slots[s].key][:0] {"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "stage-reused-early", Rule: "a chunk of the stage is used again while it is being written", File: "storage/flight.go",
		Edits: []Edit{
			{"		fl.started = true\n", "		fl.started = true\n		if fl.r == nil {\n			d.giveUp(fl)\n		}\n"},
			{"			if fl.f.err == nil { // else", "			if fl.f.err == nil && fl.carried { // else"},
		},
		Package: "./storage", Test: "^Test(Crash|Stage)",
	},
	{
		Name: "stage-unread-whole", Rule: "blocks count as whole although the stage could not be read", File: "storage/open.go",
		Edits:   []Edit{{"		r.unstaged = true\n", "		_ = r.unstaged\n"}},
		Package: "./storage", Test: "^TestStage",
	},
	{
		Name: "stage-of-any-boot", Rule: "what a power cut has left of the stage counts", File: "storage/stage.go",
		Edits:   []Edit{{"	return size, string(page[:stageOffEntries]) == string(want[:])", "	return size, size > 0"}},
		Package: "./storage", Test: "^TestStage",
	},
	{
		Name: "stage-forgets-first", Rule: "the stage forgets a block before its deletion is written", File: "storage/seal.go",
		Edits:   []Edit{{"	err := d.writeEntry(s)\n	if err != nil {\n		d.fail(f, err)\n	}\n	d.abandon(s)\n", "	d.abandon(s)\n	err := d.writeEntry(s)\n	if err != nil {\n		d.fail(f, err)\n	}\n"}},
		Package: "./storage", Test: "^TestStage",
	},
	{
		Name: "stage-emptied", Rule: "a new stage takes the place of one that holds what could not be restored", File: "storage/stage.go",
		Edits:   []Edit{{"	if r.unstaged || len(r.kept) > 0 {", "	if d.closed {"}},
		Package: "./storage", Test: "^TestStage",
	},
	{
		Name: "carried-for-a-put", Rule: "a chunk written durably counts for the bytes of a Put", File: "storage/stage.go",
		Edits: []Edit{
			{" ||\n		slices.ContainsFunc(g.served, func(r *torus.Request) bool { return r.Op != torus.OpSync }) {", " {"},
			{" || r.Op != torus.OpSync && r.Op != torus.OpSeal {", " {"},
		},
		Package: "./storage", Test: "^TestStage",
	},
	{
		Name: "carried-over-gap", Rule: "a chunk written durably counts for the bytes before it, which are not", File: "storage/stage.go",
		Edits:   []Edit{{"d.opens[x.open].durable == g.carried[0].off", "d.opens[x.open].durable <= g.carried[0].off"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "carried-without-entry", Rule: "a chunk written durably counts for the entry of its block, which is not", File: "storage/stage.go",
		Edits:   []Edit{{"	return x.entry == entryClean && x.open >= 0", "	return x.open >= 0"}},
		Package: "./storage", Test: "^TestCrash",
		Harmless: "the first append to a block lists its slot twice, once for the entry and once for the bytes, and no chunk is filled behind a later entry. The condition says what is relied upon.",
	},
	{
		Name: "carried-for-all", Rule: "a chunk written durably counts for other blocks of the file", File: "storage/stage.go",
		Edits:   []Edit{{"len(g.carried) != 1 || len(g.flying) != 1 ||", "len(g.carried) != 1 ||"}},
		Package: "./storage", Test: "^TestStage",
	},
	{
		Name: "crc-unchecked", Rule: "a read's checksums are not checked", File: "file/read.go",
		Edits: []Edit{{"		if record.Checksum(x.contents(rd.Data, p))&0xffffff != p.e.crc() {\n			return false", "		if len(x.contents(rd.Data, p)) == 0 {\n			return false"}},
	},
	{
		Name: "empty-disk", Rule: "a wiped peer comes back under its old identity", File: "storage/open.go",
		Edits: []Edit{{"	id, err := ReadIdentity(cfg.FS)\n", "	if _, e := ReadIdentity(cfg.FS); errors.Is(e, fs.ErrNotExist) {\n		_ = Create(cfg.FS, cfg.Identity)\n	}\n	id, err := ReadIdentity(cfg.FS)\n"}},
	},
	{
		Name: "other-bytes-again", Rule: "an append over what is there is taken without comparing (D2)", File: "storage/append.go",
		Edits:   []Edit{{"		if err == nil && !same {\n			err = errDiffers(r)\n		}\n		if err != nil {\n			d.refuse(r, err)\n			return true\n		}\n		if data", "		_ = same\n		if err != nil {\n			d.refuse(r, err)\n			return true\n		}\n		if data"}},
		Package: "./storage", Test: "^Test",
	},

	// Checkpoints.
	{
		Name: "ckpt-unsynced", Rule: "a checkpoint covers records that are not flushed", File: "file/checkpoint.go",
		Edits: []Edit{{"	z, err := f.freeze()\n", "	f.flushed = f.held\n	f.apply()\n	z, err := f.freeze()\n"}},
	},
	{
		Name: "ckpt-leaves-not-durable", Rule: "a checkpoint is committed before its nodes are durable", File: "file/side.go",
		Edits: []Edit{{"	if failed == nil {\n		reqs = reqs[:0]", "	if failed == nil && len(recs) == 0 {\n		reqs = reqs[:0]"}},
	},
	{
		Name: "shrink-early", Rule: "lo moves past blocks whose records the map lacks", File: "file/checkpoint.go",
		Edits: []Edit{{"			lo = min(lo, r.home)\n", ""}, {"			lo = min(lo, uint64(r.blk.ref.Index))\n", "			_ = r\n"}},
	},
	{
		Name: "copy-below-lo", Rule: "lo moves past the block that an acknowledged record is whole in, while it is sent again", File: "file/checkpoint.go",
		Edits: []Edit{{"			lo = min(lo, r.home)\n", ""}},
		// Two faults at once and a checkpoint in between: schedules come to it once in a thousand seeds or two, so it is asked of a test that is about it.
		Package: "./file", Test: "^TestWindowKeepsHomeOfRolledRecords$",
	},
	{
		Name: "delete-before-commit", Rule: "blocks are deleted before the INode without them is committed", File: "file/checkpoint.go",
		Edits: []Edit{{"		f.table.remove(slot)\n", "		f.table.remove(slot)\n		for _, p := range saved.peers {\n			f.dist.Submit(p, &torus.Request{Op: torus.OpDelete, Ref: saved.ref, Epoch: f.epoch, Peer: p, Done: func(*torus.Request) {}})\n		}\n"}},
	},

	// Transactions.
	{
		Name: "txn-epoch-only", Rule: "a transaction compares the epoch and not the revision: a late duplicate puts an old head or window back", File: "metadata/temp/client.go",
		Edits: []Edit{{"		if v.revision != from.Revision {", "		if v.state.Epoch != from.Epoch {"}},
	},
	{
		Name: "ckpt-any-epoch", Rule: "a transaction compares nothing", File: "metadata/temp/client.go",
		Edits: []Edit{{"		if v.revision != from.Revision {", "		if v.revision < 0 {"}},
	},
	{
		Name: "lost-answer-is-failure", Rule: "a transaction whose answer was lost is taken for one that was not made", File: "file/window.go",
		Edits: []Edit{
			{"			now, rerr := f.cfg.MDS.VolumeState(ctx, f.vol)\n", "			now, rerr := f.cfg.MDS.VolumeState(ctx, f.vol)\n			if rerr == nil && now.Epoch == from.Epoch {\n				f.state, rerr = now, err\n			}\n"},
			{"		switch {\n		case err == nil:\n			f.state = st\n", "		switch {\n		case err != nil && st.VolumeState == nil && !errors.Is(err, torus.ErrNotExist):\n			return err\n		case err == nil:\n			f.state = st\n"},
		},
	},
	{
		Name: "lost-answer-is-success", Rule: "a transaction whose answer was lost is taken for one that was made", File: "file/window.go",
		Edits: []Edit{{"				from = now // it has not: try again\n", "				if from = now; !again {\n					st, err = now, nil\n				}\n"}},
	},

	// Attach.
	{
		Name: "seal-first", Rule: "an attach seals the blocks of the window before it commits", File: "file/attach.go",
		Edits: []Edit{{"	if err := a.copies(); err != nil { // step 5\n", "	for _, b := range a.blocks {\n		for _, p := range b.set {\n			f.dist.Submit(p, &torus.Request{Op: torus.OpSeal, Ref: b.ref, Epoch: f.epoch, Len: b.used, Peer: p, Done: func(*torus.Request) {}})\n		}\n	}\n	if err := a.copies(); err != nil { // step 5\n"}},
	},
	{
		Name: "take-first", Rule: "the first tail counts, not the longest", File: "file/attach.go",
		Edits: []Edit{{"				b.length = max(b.length, op.tails[b.ref.Index])\n", "				b.length = op.tails[b.ref.Index]\n				break\n"}},
		// The copies of an unflushed tail differ where power was lost at one replica, or a writer died in the middle of a send: seldom enough to ask a test.
		Package: "./file", Test: "^TestRecoveryTakesTheLongestTail$",
	},
	{
		Name: "committed-ignored", Rule: "an attach does not stop where the log ends below what was flushed", File: "file/attach.go",
		Edits: []Edit{{"	if a.seqUpTo < a.committed {\n", "	if a.seqUpTo < a.committed && len(a.blocks) == 0 {\n"}},
	},
	{
		Name: "any-peer-answers", Rule: "a peer answers for blocks of whose registered set it is not", File: "file/attach.go",
		Edits: []Edit{{"		for _, p := range b.set {\n			ok = ok || a.peers[p].answered\n		}\n", "		for _, p := range a.order {\n			ok = ok || a.peers[p].answered\n		}\n"}},
		// All peers of one block are away for an attach, and others are not: schedules hardly ever have it.
		Package: "./file", Test: "^TestAttachWaitsForEveryBlock$",
	},
	{
		Name: "burned-ends", Rule: "an empty block ends the recovery", File: "file/attach.go",
		Edits: []Edit{{"			busy = append(busy, b)\n		}\n", "			busy = append(busy, b)\n		} else {\n			break\n		}\n"}},
	},
	{
		Name: "commit-without-copies", Rule: "an attach commits before what it found is durable on the whole set", File: "file/attach.go",
		Edits: []Edit{{"		if err := a.complete(b); err != nil {\n", "		b.whole = true\n		if err := error(nil); err != nil {\n"}},
	},
	{
		Name: "copies-not-synced", Rule: "a recovery's copies are not synced", File: "file/attach.go",
		Edits: []Edit{{"	f.all(a.t, reqs, func(r *torus.Request) {\n		if r.Err != nil {\n			failed = r.Err", "	f.all(a.t, reqs[:0], func(r *torus.Request) {\n		if r.Err != nil {\n			failed = r.Err"}},
	},
	{
		Name: "in-place-only", Rule: "recovered records may lie in their own blocks only", File: "file/attach.go",
		Edits: []Edit{{"			a.f.log.Info(\"block cannot be completed in place\", \"block\", b.ref.String(), \"err\", err)\n", "			return again(err)\n"}},
	},
	{
		Name: "open-before-head", Rule: "an attach registers its window before it commits what it found", File: "file/attach.go",
		Edits: []Edit{{"	if err := a.copies(); err != nil { // step 5\n", "	f.takeMeta(t)\n	err := f.commit(t, func(s *models.VolumeState) error {\n		s.Open = &models.Window{Epoch: f.epoch, Spans: []*models.Span{f.newSpan(f.next, windowBlocks)}}\n		return nil\n	})\n	f.releaseMeta()\n	if err != nil {\n		return err\n	}\n	if err := a.copies(); err != nil { // step 5\n"}},
	},
	{
		Name: "fenced-goes-on", Rule: "a writer that is told of a newer epoch goes on", File: "file/ack.go",
		Edits: []Edit{{"		f.fenced(q.Fence)\n		return\n", "		return\n"}},
		More:  map[string][]Edit{"file/file.go": {{"			if errors.Is(r.Err, torus.ErrFenced) && f.err == nil {", "			if errors.Is(r.Err, torus.ErrFenced) && f.err != nil {"}}},
	},

	{
		Name: "doubt-ignored", Rule: "an attach takes the tail of a copy that is known to be damaged for the block's", File: "file/attach.go",
		Edits:   []Edit{{"!sure && !a.peers[p].answered", "!sure && a.f.repl == 0"}},
		Package: "./sim", Test: "^TestDamagedCopyDoesNotEndTheLog$",
	},

	{
		Name: "flushed-dropped", Rule: "an attach drops a record whose only copies are damaged, though it is known to have been flushed", File: "file/attach.go",
		Edits:   []Edit{{" && r.hdr.Seq > a.committed && ", " && "}},
		Package: "./sim", Test: "^TestOnlyCopyIsDamaged$",
	},

	// A full cluster.
	{
		Name: "kept-for-all", Rule: "any write may take the slots that a store keeps back", File: "storage/disk.go",
		Edits:   []Edit{{"		limit -= d.kept\n", "		limit -= 0\n"}, {"	if !reserve && d.scarce() {", "	if !reserve && d.limit == 0 {"}},
		Package: "./sim", Test: "^TestFullClusterIsRecoveredAndTrimmed$",
	},
	{
		Name: "copies-without-reserve", Rule: "a recovery's copies and a checkpoint take ordinary slots", File: "file/side.go",
		Edits:   []Edit{{", Peer: p, Reserve: r.blk.ref.Type != torus.TypeMoved,", ", Peer: p,"}},
		Package: "./file", Test: "^TestAttachWhenFull$",
	},
	{
		Name: "discard-listed", Rule: "an attach deletes blocks of the old window that the new head lists", File: "file/attach.go",
		Edits: []Edit{{"; listed || b.atHead {", "; listed && b.atHead {"}},
	},

	// Moments, and what is moved.
	{
		Name: "move-over-newer", Rule: "a page that compaction has moved is applied over one written since", File: "file/compact.go",
		Edits: []Edit{{"!ok || now != m.from {\n				continue // written since", "!ok || now.kind() != entryData {\n				continue // written since"}},
	},
	{
		Name: "move-not-durable", Rule: "the map points to moved pages before they are durable", File: "file/side.go",
		Edits: []Edit{{"	if failed == nil {\n		reqs = reqs[:0]", "	if failed == nil && (len(recs) == 0 || recs[0].blk.ref.Type != torus.TypeMoved) {\n		reqs = reqs[:0]"}},
	},
	{
		Name: "pinned-dropped", Rule: "a checkpoint drops blocks that a pin needs", File: "file/checkpoint.go",
		Edits: []Edit{{"		if z.pins.need(e) {", "		if z.pins.need(e) && e.ref.Volume == 0 {"}},
	},
	{
		Name: "log-of-pin-dropped", Rule: "a pin keeps its INode's blocks, and not those of the log behind it", File: "file/pins.go",
		Edits: []Edit{{"		return p.log[i-1] >= e.birth\n", "		return p.base[i-1] >= e.birth\n"}},
	},
	{
		Name: "pin-before-flush", Rule: "a snapshot is pinned before its last record is flushed", File: "file/snapshot.go",
		Edits: []Edit{{"		err := f.flushTo(t, at.Seq)\n", "		err := error(nil)\n"}},
		// Power has to be lost everywhere within the milliseconds between pin and flush.
		Package: "./file", Test: "^TestSnapshotIsFlushedBeforeItIsPinned$",
	},
	{
		Name: "ckpt-while-pinning", Rule: "a checkpoint may come between the choice of a snapshot's last record and its pin", File: "file/checkpoint.go",
		Edits: []Edit{{"now-f.lastCkpt < every) || f.pinning {", "now-f.lastCkpt < every) {"}},
		// The pin is in the MDS's queue before the checkpoint's, unless all that the checkpoint writes is answered at once.
		Package: "./file", Test: "^TestNoCheckpointWhilePinning$",
	},
	{
		Name: "foreign-deleted", Rule: "a clone deletes blocks of its origin that it has no more use for", File: "file/checkpoint.go",
		Edits: []Edit{{"		if e.ref.Volume != f.vol {\n			continue // another", "		if e.ref.Volume == 0 {\n			continue // another"}},
	},
	{
		Name: "moment-cut-short", Rule: "the replay of a moment stops a record early", File: "file/snapshot.go",
		Edits: []Edit{{"f.logBehind(vol, m), baseSeq, m.Seq)", "f.logBehind(vol, m), baseSeq, max(m.Seq-1, 1))"}},
	},
	{
		Name: "failed-number-lost", Rule: "the number of a checkpoint that failed is not given back: what it listed is born too late", File: "file/checkpoint.go",
		Edits: []Edit{{"	f.number--\n	f.table.next = f.number + 1\n", "	f.table.next = f.number + 1\n"}},
	},
	{
		Name: "new-pin-unnoticed", Rule: "a checkpoint is committed though more is pinned than when it began", File: "file/checkpoint.go",
		Edits: []Edit{{"		if !z.pins.cover(s) {", "		if f.err != nil && !z.pins.cover(s) {"}},
		// A snapshot is taken in the milliseconds that a checkpoint takes, of a log with a block that is dead by then: hardly a schedule in a thousand.
		Package: "./file", Test: "^TestPinWhileCheckpointIsWritten$",
	},
	{
		Name: "pin-beyond-next", Rule: "a checkpoint is committed that ends before the moment pinned with the INode before it: the log in between is not listed", File: "file/checkpoint.go",
		Edits: []Edit{{"p.At.Seq > z.head.Seq {", "p.At.Seq > z.head.Seq && f.err != nil {"}},
	},
	{
		Name: "commit-anew", Rule: "a transaction whose answer was lost is laid out anew, and not known again when it was made", File: "file/window.go",
		Edits: []Edit{{"		if amended {\n", "		if amended || err != nil {\n"}},
		// Two answers in succession are lost, and a peer goes before the third attempt: hardly a schedule in a thousand.
		Package: "./file", Test: "^TestLostAnswerIsKnownAgain$",
	},
	{
		Name: "retained-too-short", Rule: "what rewinding needs is let go in half of the time", File: "file/history.go",
		Edits: []Edit{{"marks[0].TimeUs+retain <= now", "marks[0].TimeUs+retain/2 <= now"}},
	},
	{
		Name: "restored-stays-dead", Rule: "what comes to life again with a moment is still listed as dead", File: "file/snapshot.go",
		Edits: []Edit{{"		case e.live > 0:\n			e.death = 0", "		case e.live > 0 && e.birth > f.number:\n			e.death = 0"}},
	},
	{
		Name: "recount-own-pages", Rule: "going back counts the pages of the old INode itself as alive", File: "file/snapshot.go",
		Edits: []Edit{{"		then.addLive(slot, -pages)\n", "		then.addLive(slot, pages-pages)\n"}},
	},
	{
		Name: "own-but-for-snapshots", Rule: "a clone whose snapshots still refer to its origin counts as one that does not", File: "file/checkpoint.go",
		Edits: []Edit{{"			z.foreign = z.foreign || e.ref.Volume != f.vol\n			if saved", "			if saved"}},
	},

	// Reads.
	{
		Name: "read-ahead-kept", Rule: "what was read ahead is read although it was written meanwhile", File: "file/ack.go",
		Edits: []Edit{{"		f.ahead.forget(&r.hdr)\n", ""}},
	},
	{
		Name: "read-ahead-late", Rule: "what was being read ahead when it was written is read", File: "file/ahead.go",
		Edits: []Edit{{"			if a.chunks[i].overlaps(", "			if a.chunks[i].loaded && a.chunks[i].overlaps("}},
	},

	{
		Name: "place-kept", Rule: "a block's slot is used again although nobody was told who reads it past the peer", File: "storage/seal.go",
		Edits:   []Edit{{"	d.ledger.Change(s)\n	d.index.remove(x.key)\n", "	d.index.remove(x.key)\n"}},
		Package: "./transport/tdp", Test: "^TestDirect",
	},
	{
		Name: "exchange-to-a-caller-with-its-own", Rule: "a read past the peer gives other memory to who cannot take it", File: "transport/tdp/direct.go",
		Edits:   []Edit{{"			if r.Buf != nil {", "			if l.n > 0 {"}},
		Package: "./transport/tdp", Test: "^TestDirect",
	},
	{
		Name: "exchange-one-way", Rule: "the memory that a read past the peer is given is given back as well", File: "transport/tdp/direct.go",
		Edits:   []Edit{{"				r.Buf, l.buf = l.buf, r.Buf\n", "				r.Buf = l.buf\n"}},
		Package: "./transport/tdp", Test: "^TestDirect",
	},
	{
		Name: "unasked-answer", Rule: "a peer answers a request that the client looks after by itself", File: "transport/tdp/direct.go",
		Edits:   []Edit{{"	k.c.slots.setOwn(id, true)\n", ""}},
		Package: "./transport/tdp", Test: "^TestDirect",
	},
	{
		Name: "exchange-never", Rule: "a run that is all of a read is copied", File: "file/read.go",
		Edits:   []Edit{{"		return r.Data[:r.Len], r.Buf\n", "		return r.Data[:r.Len], nil\n"}},
		Package: "./file", Test: "^TestExchange",
	},
	{
		Name: "exchange-and-data-stays", Rule: "a read past the peer exchanges the memory, and the data is said to be in the old", File: "transport/tdp/direct.go",
		Edits:   []Edit{{"				r.Data = r.Buf.Bytes()[:l.n]\n", ""}},
		Package: "./transport/tdp", Test: "^TestDirect",
	},
	{
		Name: "exchange-not-told", Rule: "the memory that a replica's answer came in is not the reader's", File: "distributor/read.go",
		Edits:   []Edit{{"	r.Data, r.Buf = q.Data, q.Buf\n", ""}},
		Package: "./distributor", Test: "^TestHedge",
	},
	{
		Name: "exchange-for-two", Rule: "memory that is the caller's again is exchanged by who is still asked", File: "distributor/hedge.go",
		Edits:   []Edit{{"w.req.Done, w.req.Data, w.req.Buf = done, w.buf.Bytes()[:len(r.Data)], nil", "w.req.Done, w.req.Data = done, w.buf.Bytes()[:len(r.Data)]"}},
		Package: "./distributor", Test: "^TestHedge",
	},
	{
		Name: "exchange-in-part", Rule: "a part of a read is exchanged for all of it", File: "file/read.go",
		Edits:   []Edit{{"	if n*pageSize == r.Len {", "	if n > 0 {"}},
		Package: "./file", Test: "^TestSchedules",
	},
	{
		Name: "exchange-not-handed-on", Rule: "the memory that a run came in is not that of the request", File: "file/read.go",
		Edits:   []Edit{{"		op.r.Data, op.r.Buf = rd.Data, rd.Buf\n", ""}},
		Package: "./file", Test: "^TestSchedules",
	},
	{
		Name: "place-not-looked-at", Rule: "what was read past the peer counts although the block is not there any more", File: "transport/tdp/direct.go",
		Edits:   []Edit{{"		if l.err == nil && l.spot.good() {", "		if l.err == nil {"}},
		Package: "./transport/tdp", Test: "^TestDirect",
	},
	{
		Name: "place-in-the-air", Rule: "what is not in the file yet is said to be", File: "storage/place.go",
		Edits:   []Edit{{"min(d.slots[s].length, d.aloft(s))", "d.slots[s].length"}},
		Package: "./storage", Test: "^TestLocate",
	},
	{
		Name: "place-of-the-lost", Rule: "what a failed disk has lost is read past the peer", File: "storage/disk.go",
		Edits:   []Edit{{"			d.ledger.Change(s)\n			lost++", "			lost++"}},
		Package: "./storage", Test: "^TestLocate",
	},

	// Clones.
	{
		Name: "clone-unforgotten", Rule: "a volume keeps for ever what a clone needed that was deleted half-way", File: "peer/repair/pass.go",
		Edits: []Edit{{"if r.cfg.Forget == nil || there[clone]", "if r.cfg.Forget != nil || there[clone]"}},
	},
	{
		Name: "forget-too-much", Rule: "what a clone needs is given up although the clone is there", File: "peer/repair/pass.go",
		Edits: []Edit{{"if r.cfg.Forget == nil || there[clone] || clone > last ||", "if r.cfg.Forget == nil ||"}},
		More:  map[string][]Edit{"block/snapshot.go": {{"	if _, err := mds.VolumeState(ctx, clone); !errors.Is(err, torus.ErrNotExist) {\n		return err\n	}\n", ""}}},
	},

	// Stores, by their crash tests.
	{
		Name: "seal-not-awaited", Rule: "a seal is answered before its entry is durable", File: "storage/seal.go",
		Edits:   []Edit{{"			if err := d.writeEntry(s); err != nil {\n				d.fail(f, err)\n				r.Finish(f.err)\n				return\n			}\n", "			if err := d.writeEntry(s); err != nil {\n				d.fail(f, err)\n				r.Finish(f.err)\n				return\n			}\n			r.Finish(nil)\n			return\n"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "seal-bytes-not-durable", Rule: "a sealed entry is written before the bytes are durable", File: "storage/seal.go",
		Edits:   []Edit{{"		if d.opens[x.open].durable >= x.length && x.entry == entryClean {", "		if x.entry == entryClean {"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "seal-no-trunc-durable", Rule: "a seal that drops a tail leaves it counted as durable", File: "storage/seal.go",
		Edits:   []Edit{{"		o.durable = min(o.durable, r.Len)\n", "		_ = o\n"}},
		Package: "./storage", Test: "^Test(Crash|SealThat)",
	},
	{
		Name: "durable-over-gap", Rule: "an append is called durable although what lies before it in its block is not", File: "storage/append.go",
		Edits:   []Edit{{"o.durable == x.length && o.flights == 0", "o.flights == 0"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "durable-without-entry", Rule: "an append is called durable although the entry of its block is not", File: "storage/append.go",
		Edits:   []Edit{{" && o.flights == 0 && x.entry == entryClean", " && o.flights == 0"}},
		Package: "./storage", Test: "^TestCrash",
		Harmless: "the entry of a block is written with its first append, and becomes durable with the fdatasync that makes those bytes durable, at the latest; a block of which all bytes are durable " +
			"has an entry that is, too. The condition says what is relied upon.",
	},
	{
		Name: "delete-reuses-early", Rule: "a slot is used again before its block's deletion is durable", File: "storage/seal.go",
		Edits:   []Edit{{"		d.refuse(r, f.err)\n		return\n	}\n	f.await(r)", "		d.refuse(r, f.err)\n		return\n	}\n	d.giveBack(s)\n	f.await(r)"}},
		Package: "./storage", Test: "^TestCrash",
	},
	{
		Name: "prewrite-no-sync", Rule: "the pre-writer does not sync before a slot of a new file is used", File: "storage/grow.go",
		Edits:   []Edit{{"	if err := f.Datasync(); err != nil {\n		return err\n	}\n	_ = f.DropCache(place", "	_ = f.DropCache(place"}},
		Package: "./storage", Test: "^TestCrash",
		Harmless: "zeroes of the pre-writer and bytes of an append are written to one file through the same page cache, one after the other, and the " +
			"fdatasync that makes an append durable covers the whole file: there is no order in which older zeroes can cover newer bytes. " +
			"The sync there is for the price of later syncs and for hearing of errors early.",
	},
}
