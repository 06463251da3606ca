package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coreos/torus"
	"github.com/coreos/torus/block"
	"github.com/coreos/torus/cmd/internal/cli"
	"github.com/coreos/torus/file"
	"github.com/coreos/torus/models"
)

func fsckCommand(c *ctl) *cobra.Command {
	var mend, always bool
	var rate cli.Size
	cmd := &cobra.Command{
		Use:   "fsck VOLUME[@SNAPSHOT]",
		Short: "Check a volume, or a snapshot of it: its metadata, and every copy of every block",
		Long: `Check a volume, or a snapshot of it: its metadata, and every copy of every block. It may be in use meanwhile; nothing is changed, and nobody is held up but
by the reads. Of a volume all that it needs is checked: what it is now, its snapshots, and what it can be rewound to.

With --repair the peers mend what has a good copy anywhere. What has none is left as it is. The exit status is 0 if everything was checked, and nothing was found
that has not been mended.`,
		Args: cli.Args("VOLUME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.withCluster(cmd.Context(), func(ctx context.Context, s *session) error {
				return s.fsck(ctx, c, cmd, args[0], mend, uint64(rate), always)
			})
		},
	}
	cmd.Flags().BoolVar(&mend, "repair", false, "have the peers mend what has a good copy, and wait for it")
	cmd.Flags().Var(&rate, "rate", "bytes a second to read at most, such as 50MiB (default: no bound)")
	cmd.Flags().BoolVarP(&always, "progress", "p", false, "show progress, though standard error is no terminal")
	return cmd
}

func (s *session) fsck(ctx context.Context, c *ctl, cmd *cobra.Command, name string, mend bool, rate uint64, always bool) error {
	if !c.debug {
		s.log = slog.New(slog.DiscardHandler) // what is wrong is said once, as a finding
	}
	p, err := s.peers(ctx)
	if err != nil {
		return err
	}
	var bar *progress
	began := false
	var done, total uint64
	cfg := block.FsckConfig{Repair: mend, Rate: rate, Progress: func(now, of uint64) {
		if done, total = now, of; !began {
			began, bar = true, newProgress(cmd.ErrOrStderr(), always, 0, of)
		}
		bar.at(now, now)
	}}
	r, failed := p.Fsck(ctx, name, cfg)
	bar.end(done, min(done, total))
	if errors.Is(failed, context.Canceled) {
		failed = errors.New("interrupted")
	}
	if r == nil || r.FsckReport == nil {
		return volumeError("check", name, failed)
	}
	peers, err := s.Peers(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	v := describeFsck(r, name, mend, peers)
	if err := v.print(c, cmd.OutOrStdout()); err != nil {
		return err
	}
	if failed != nil {
		return volumeError("check", name, failed)
	}
	return v.verdict(mend)
}

// fsckJSON is what a check has found.
type fsckJSON struct {
	Volume          string        `json:"volume"` // or VOL@SNAP
	Status          string        `json:"status"` // ok, mended, incomplete, damaged
	INode           uint64        `json:"inode"`  // the newest
	INodesChecked   uint64        `json:"inodes_checked"`
	NodesChecked    uint64        `json:"map_nodes_checked"`
	PagesChecked    uint64        `json:"pages_checked"`
	BlocksChecked   uint64        `json:"blocks_checked"`
	CopiesChecked   uint64        `json:"copies_checked"`
	BytesChecked    uint64        `json:"bytes_checked"`
	CopiesUnchecked uint64        `json:"copies_unchecked"`
	Unchecked       []fsckPeer    `json:"unchecked"`
	Left            uint64        `json:"findings_left"`
	Findings        []fsckFinding `json:"findings"`
	Unlisted        uint64        `json:"findings_unlisted"`
	Notes           []string      `json:"notes"`
}

type fsckPeer struct {
	UUID    string `json:"uuid"`
	Address string `json:"address"`
	Copies  uint64 `json:"copies,omitempty"`
}

func (p fsckPeer) String() string {
	if p.Address == "" {
		return p.UUID
	}
	return fmt.Sprintf("%s (%.8s)", strings.TrimPrefix(p.Address, "tdp://"), p.UUID)
}

type fsckFinding struct {
	Kind     string     `json:"kind"`
	Block    string     `json:"block,omitempty"`
	Peer     *fsckPeer  `json:"peer,omitempty"`
	What     string     `json:"what"`
	Good     []fsckPeer `json:"good,omitempty"` // who has a good copy
	Away     []fsckPeer `json:"away,omitempty"` // who may have one, and could not be asked
	Lost     []fsckLost `json:"lost,omitempty"`
	Mendable bool       `json:"mendable"`
	Mended   bool       `json:"mended"`
	Meaning  string     `json:"meaning"`
}

type fsckLost struct {
	Of    string `json:"of"`
	First uint64 `json:"first_page"`
	Pages uint64 `json:"pages"` // 0: some
}

func describeFsck(r *block.FsckResult, name string, mend bool, peers []*models.Peer) fsckJSON {
	v := fsckJSON{
		Volume: name, Status: "ok", INode: r.State.GetHead().GetNumber(), INodesChecked: r.INodes, NodesChecked: r.Nodes, PagesChecked: r.Entries,
		BlocksChecked: r.Blocks, CopiesChecked: r.Copies, BytesChecked: r.Bytes, Left: r.Left(), Unlisted: r.More,
		Unchecked: []fsckPeer{}, Findings: []fsckFinding{}, Notes: []string{},
	}
	peer := func(id torus.PeerID) fsckPeer {
		p := fsckPeer{UUID: id.String()}
		for _, m := range peers {
			if m.Uuid == p.UUID {
				p.Address = m.Address
			}
		}
		return p
	}
	list := func(l torus.PeerList) (out []fsckPeer) {
		for _, id := range l {
			out = append(out, peer(id))
		}
		return out
	}
	for id, n := range r.Unchecked {
		p := peer(id)
		p.Copies = n
		v.CopiesUnchecked += n
		v.Unchecked = append(v.Unchecked, p)
	}
	slices.SortFunc(v.Unchecked, func(x, y fsckPeer) int { return strings.Compare(x.UUID, y.UUID) })
	for _, x := range r.Findings {
		f := fsckFinding{Kind: string(x.Kind), What: x.What, Good: list(x.Good), Away: list(x.Away), Mendable: x.Mendable(), Mended: x.Mended}
		if x.Ref != (torus.BlockRef{}) {
			f.Block = x.Ref.String()
		}
		if !x.Peer.IsZero() {
			p := peer(x.Peer)
			f.Peer = &p
		}
		for _, l := range x.Lost {
			f.Lost = append(f.Lost, fsckLost{lostOf(r, name, l.Of), l.First, l.Count})
		}
		f.Meaning = f.meaning(x.Kind, name, mend)
		v.Findings = append(v.Findings, f)
	}
	v.Notes = append(v.Notes, fsckNotes(r)...)
	switch {
	case v.Left > 0:
		v.Status = "damaged"
	case v.CopiesUnchecked > 0:
		v.Status = "incomplete"
	case len(v.Findings) > 0:
		v.Status = "mended"
	}
	return v
}

// lostOf names what pages are of.
func lostOf(r *block.FsckResult, name, of string) string {
	vol := r.Volume.Name
	var id uint64
	switch {
	case of == "":
		return name
	case strings.HasPrefix(of, "@"):
		return vol + of
	case of == file.ThePast:
		return "the past of " + vol
	}
	if _, err := fmt.Sscanf(of, "clone %d", &id); err == nil && r.Names[id] != "" {
		return "its clone " + r.Names[id]
	}
	return of
}

// meaning says what a finding means for whoever uses the volume, and what can be done.
func (f *fsckFinding) meaning(kind file.FindingKind, name string, mend bool) string {
	pages := f.pages()
	switch {
	case f.Mended:
		return "mended from " + names(f.Good)
	case f.Mendable && mend:
		return "a good copy is on " + names(f.Good) + ": the log of the peer says why it is not mended"
	case f.Mendable:
		return fmt.Sprintf("a good copy is on %s: `torusctl fsck --repair %s` mends it", names(f.Good), name)
	}
	switch kind {
	case file.FindUnknown:
		if len(f.Away) == 0 {
			return pages + "could not be checked; check again"
		}
		return "no good copy where peers could be asked: " + pages + "cannot be read; bring back " + names(f.Away)
	case file.FindFewer:
		return "the ring needs more members (torusctl peer add), or the volume was written when it had fewer"
	case file.FindLive:
		return "no data is lost; the count is not changed"
	case file.FindDiffer:
		return "which is right is not known: nothing is changed"
	case file.FindLost, file.FindINode, file.FindMap, file.FindLog, file.FindMoment, file.FindLostPages:
		if pages == "" {
			return "no good copy, and nothing that is in use is lost"
		}
		return "no good copy: " + pages + "lost; a volume reads again where it is written anew"
	case file.FindEntry:
		return pages + "read as errors, or as other pages than they are"
	}
	return ""
}

// maxRuns bounds the runs of pages that a line names.
const maxRuns = 20

// pages lists what is lost, with a space behind; empty: nothing.
func (f *fsckFinding) pages() string {
	var all []string
	for i := 0; i < len(f.Lost); {
		of, runs, one := f.Lost[i].Of, []string(nil), true
		for ; i < len(f.Lost) && f.Lost[i].Of == of; i++ {
			l := f.Lost[i]
			one = one && l.Pages == 1 && len(runs) == 0
			switch {
			case len(runs) > maxRuns:
			case len(runs) == maxRuns:
				runs = append(runs, "…")
			case l.Pages == 0:
				runs = append(runs, "some")
			case l.Pages == 1:
				runs = append(runs, fmt.Sprint(l.First))
			default:
				runs = append(runs, fmt.Sprintf("%d-%d", l.First, l.First+l.Pages-1))
			}
		}
		what := "pages "
		if one {
			what = "page "
		}
		all = append(all, what+strings.Join(runs, ", ")+" of "+of)
	}
	if len(all) == 0 {
		return ""
	}
	return strings.Join(all, " and ") + " "
}

func names(l []fsckPeer) string {
	var s []string
	for _, p := range l {
		s = append(s, p.String())
	}
	return strings.Join(s, ", ")
}

// fsckNotes says what is no damage, and good to know.
func fsckNotes(r *block.FsckResult) (l []string) {
	note := func(format string, args ...any) { l = append(l, fmt.Sprintf(format, args...)) }
	s := r.State
	if r.Origin {
		note("nothing has been written to the clone yet: what it has of its origin was checked")
	}
	if s.GetHead() == nil {
		note("nothing has been committed yet: there is nothing to check")
	}
	switch {
	case s.GetOpen() == nil || r.Origin || r.Pin != nil:
	case r.Holder != nil:
		note("attached by %s (pid %d): what it has written since the last checkpoint was not checked", r.Holder.Host, r.Holder.Pid)
	default:
		note("not released in order: the end of its log awaits the next attach, and was not checked; that is no damage")
	}
	for _, p := range s.GetPins() {
		if (r.Pin == nil || r.Pin.Name == p.Name && p.Clone == 0) && !r.Origin && !file.Settled(s, p.At) {
			note("%s%s ends in the log that is not committed yet, which was not checked", r.Volume.Name, lostOf(r, "", file.PinName(p)))
		}
	}
	if r.Pin == nil && !r.Origin && s.GetHead() != nil && !r.Counted {
		note("live pages were not counted, as the volume changed meanwhile, or its map cannot be read")
	}
	return l
}

func (v *fsckJSON) print(c *ctl, w io.Writer) error {
	if c.out.Format != "table" {
		t := cli.Table{Columns: []string{"kind", "block", "peer", "what", "meaning", "mended"}}
		for _, f := range v.Findings {
			p := ""
			if f.Peer != nil {
				p = f.Peer.UUID
			}
			t.Rows = append(t.Rows, []any{f.Kind, f.Block, p, f.What, f.Meaning, f.Mended})
		}
		return c.out.Print(w, v, t)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s: checked %d blocks, %d copies, %s; %d pages by %d nodes of maps, %d INodes\n", v.Volume, v.BlocksChecked, v.CopiesChecked,
		cli.FormatSize(v.BytesChecked, false), v.PagesChecked, v.NodesChecked, v.INodesChecked)
	for _, f := range v.Findings {
		b.WriteString(f.Kind)
		if f.Block != "" {
			b.WriteString(" " + f.Block)
		}
		if f.Peer != nil {
			b.WriteString(" at " + f.Peer.String())
		}
		b.WriteString(": " + f.What)
		if f.Meaning != "" {
			b.WriteString("; " + f.Meaning)
		}
		b.WriteString("\n")
	}
	if v.Unlisted > 0 {
		fmt.Fprintf(&b, "%d more of the kind\n", v.Unlisted)
	}
	for _, p := range v.Unchecked {
		fmt.Fprintf(&b, "not checked: %d copies at %s, which is down\n", p.Copies, p)
	}
	for _, n := range v.Notes {
		fmt.Fprintf(&b, "note: %s\n", n)
	}
	if len(v.Findings) == 0 {
		b.WriteString("nothing is wrong\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// verdict is the error that a check ends with; nil: all is well.
func (v *fsckJSON) verdict(mend bool) error {
	e := &torus.Error{Op: "check", Obj: "volume " + v.Volume}
	switch {
	case v.Left > 0:
		e.Err = fmt.Errorf("%s: %w", plural(v.Left, "finding"), torus.ErrCorrupt)
		if mend {
			e.Err = fmt.Errorf("%s left: %w", plural(v.Left, "finding"), torus.ErrCorrupt)
		} else if slices.ContainsFunc(v.Findings, func(f fsckFinding) bool { return f.Mendable }) {
			e.Hint = "Have what has a good copy mended: torusctl fsck --repair " + v.Volume
		}
	case v.CopiesUnchecked > 0:
		e.Err = fmt.Errorf("nothing is wrong with what was checked, but %d copies were not: %w", v.CopiesUnchecked, torus.ErrBlockUnavailable)
		e.Hint = "Start the peers that are down, and check again; see: torusctl status"
	default:
		return nil
	}
	return e
}

func plural(n uint64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
