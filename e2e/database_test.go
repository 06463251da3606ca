package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/torus/e2e/nbdclient"
)

// Databases on a file system on a volume. When torusblk is killed, everything above it gets I/O errors and is taken down by
// force, as if their machine had crashed: what was written and not flushed may be gone. Then the volume is attached again, the file
// system replays its journal and the database its own: every commit that was acknowledged must be there (D1), nothing damaged (C1).
func TestPostgres(t *testing.T) {
	testDatabase(t, "ext4", 2, func(dir string) database { return &postgres{dir: dir} })
}

func TestSQLite(t *testing.T) {
	testDatabase(t, "xfs", 2, func(dir string) database { return &sqlite{dir: dir} })
}

func testDatabase(t *testing.T, short string, rs int, make func(dir string) database) {
	for _, fs := range []string{"ext4", "xfs"} {
		if fs != short && !soaking() {
			continue // one of the two is enough for a short run
		}
		t.Run(fs, func(t *testing.T) {
			c := sharedCluster(t)
			volume := c.newVolume(t, "1GiB")
			d := &torusDisk{c: c, volume: volume, blk: c.newBlk(t, "--force")}
			dir := openDir(t)
			db := make(dir)
			if err := prepare(t, dir, fs, db, d.blk.export(volume)); err != nil {
				t.Fatal(err)
			}
			n := rounds(t, rs, 20)
			for round := range n {
				if err := crashAndCheck(t, dir, fs, db, d, round); err != nil {
					t.Fatalf("round %d: %v", round+1, err)
				}
			}
			t.Logf("COMMITS %s, %d crashes: %d acknowledged, none lost", fs, n, db.acked())
		})
	}
}

// A server that acknowledges flushes and forgets them when it is killed: both databases must notice.
func TestControlForgottenFlush(t *testing.T) {
	for name, make := range map[string]func(dir string) database{
		"postgres": func(dir string) database { return &postgres{dir: dir} },
		"sqlite":   func(dir string) database { return &sqlite{dir: dir} },
	} {
		if name == "postgres" && !soaking() {
			continue // to set it up takes half a minute
		}
		t.Run(name, func(t *testing.T) {
			dir := openDir(t)
			d := &lyingDisk{dir: dir, image: filepath.Join(dir, "disk")}
			tool(t, "truncate", "-s", "1G", d.image)
			db := make(dir)
			a := d.serve(t, true)
			if err := prepare(t, dir, "ext4", db, a); err != nil {
				t.Fatal(err)
			}
			d.end()
			err := crashAndCheck(t, dir, "ext4", db, d, 0)
			if err == nil {
				t.Error("D1: forgotten flushes were not noticed")
			}
			t.Logf("noticed: %v", err)
		})
	}
}

// openDir is a directory that other users may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir := tempDir(t)
	for _, d := range []string{shared.dir, dir} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// database is one that a test loads and crashes. Its files are in mnt, which comes and goes.
type database interface {
	// create makes it.
	create(t *testing.T, mnt string) error
	// load starts it and begins to commit; stop ends both by force.
	load(t *testing.T, mnt string) (stop func(), err error)
	// check starts it, so that it recovers, looks for every acknowledged commit and for damage, and ends it in order.
	check(t *testing.T, mnt string) error
	acked() int
}

// disk is what the volume's NBD server is to these tests.
type disk interface {
	// attach makes it serve.
	attach(t *testing.T) nbdclient.Address
	// crash kills it; what else is lost with it depends on the round.
	crash(t *testing.T, round int)
	// mend brings back what attach did not need.
	mend(t *testing.T)
}

// prepare makes a file system and the database on it, and ends in order.
func prepare(t *testing.T, dir, fs string, db database, a nbdclient.Address) error {
	t.Helper()
	m, err := attachMount(t, dir, a)
	if err != nil {
		return err
	}
	tool(t, "mkfs."+fs, "-q", map[string]string{"ext4": "-F", "xfs": "-f"}[fs], m.loop)
	if err := m.mount(fs); err != nil {
		return err
	}
	if err := db.create(t, m.at); err != nil {
		return err
	}
	return m.close(fs)
}

// crashAndCheck runs the database, crashes the disk under it and checks what is left. The error is what is wrong with that.
func crashAndCheck(t *testing.T, dir, fs string, db database, d disk, round int) error {
	t.Helper()
	m, err := attachMount(t, dir, d.attach(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.mount(fs); err != nil {
		t.Fatal(err)
	}
	before := db.acked()
	stop, err := db.load(t, m.at)
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Duration(1000+round*137%1000) * time.Millisecond)
	d.crash(t, round)
	stop()
	m.crash()
	if db.acked() == before {
		t.Error("nothing was committed before the crash")
	}
	began := time.Now()
	if m, err = attachMount(t, dir, d.attach(t)); err != nil {
		return err
	}
	defer m.crash()
	if err := m.mount(fs); err != nil {
		return err
	}
	mounted := time.Since(began)
	if err := db.check(t, m.at); err != nil {
		return err
	}
	d.mend(t)
	if err := m.close(fs); err != nil {
		return err
	}
	t.Logf("round %d on %s: %d commits acknowledged before the crash, mounted after %v, checked after %v",
		round+1, fs, db.acked()-before, mounted.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
	return nil
}

// mountedDisk is an export with a file system on it, mounted in this kernel.
type mountedDisk struct {
	t    *testing.T
	at   string // mount point
	fuse string // nbdfuse's mount point
	loop string // the loop device
	nbd  *process
	undo []func() error // newest last
}

// attachMount makes an export a loop device. It is gone at the end of the test, at the latest.
func attachMount(t *testing.T, dir string, a nbdclient.Address) (*mountedDisk, error) {
	t.Helper()
	m := &mountedDisk{t: t, at: filepath.Join(dir, "mnt"), fuse: filepath.Join(dir, "fuse")}
	for _, d := range []string{m.at, m.fuse} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(m.crash)
	conn := dial(t, a, leaseTime+5*time.Second) // the attach, which may have to wait
	m.nbd = newProcess(dir, "nbdfuse", "nbdfuse", m.fuse, a.URI())
	m.nbd.start(t)
	m.undo = append(m.undo, func() error {
		_, err := try(context.Background(), "umount", m.fuse)
		if err != nil {
			_, err = try(context.Background(), "umount", "-l", m.fuse)
		}
		m.nbd.kill()
		return err
	})
	file := filepath.Join(m.fuse, "nbd")
	eventually(t, startLimit, "nbdfuse serves", func() error {
		_, err := os.Stat(file)
		return err
	})
	conn.Close()
	out, err := try(context.Background(), "losetup", "--direct-io=on", "-f", "--show", file)
	if err != nil {
		return nil, err
	}
	m.loop = strings.TrimSpace(out)
	m.undo = append(m.undo, func() error {
		_, err := try(context.Background(), "losetup", "-d", m.loop)
		eventually(t, startLimit, "the loop device lets go", func() error {
			out, err := try(context.Background(), "losetup", "-j", file)
			if err == nil && out != "" {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
		return err
	})
	return m, nil
}

func (m *mountedDisk) mount(fs string) error {
	if _, err := try(context.Background(), "mount", "-t", fs, m.loop, m.at); err != nil {
		return err
	}
	m.undo = append(m.undo, func() error {
		// Whoever had files open there was killed, and may take a moment.
		var err error
		for range 100 {
			if _, err = try(context.Background(), "umount", m.at); err == nil {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
		return err
	})
	return nil
}

// close unmounts, checks the file system and detaches.
func (m *mountedDisk) close(fs string) error {
	umount := m.undo[len(m.undo)-1]
	m.undo = m.undo[:len(m.undo)-1]
	check := map[string][]string{"ext4": {"e2fsck", "-fn"}, "xfs": {"xfs_repair", "-n"}}[fs]
	err := umount()
	if err == nil {
		_, err = try(context.Background(), append(check, m.loop)...)
	}
	return errors.Join(err, m.takeDown())
}

// crash takes everything down, whatever works of it.
func (m *mountedDisk) crash() {
	if err := m.takeDown(); err != nil {
		m.t.Logf("taking down: %v", err)
	}
}

func (m *mountedDisk) takeDown() (err error) {
	for len(m.undo) > 0 {
		last := m.undo[len(m.undo)-1]
		m.undo = m.undo[:len(m.undo)-1]
		err = errors.Join(err, last())
	}
	return err
}

// torusDisk is a volume of a cluster.
type torusDisk struct {
	c      *cluster
	volume string
	blk    *blk
	lost   *peer
}

func (d *torusDisk) attach(t *testing.T) nbdclient.Address {
	t.Helper()
	if !d.blk.alive() {
		d.blk.serve(t)
	}
	return d.blk.export(d.volume)
}

// crash kills torusblk alone; or a peer just before it, which stays away; or every peer and torusblk.
func (d *torusDisk) crash(t *testing.T, round int) {
	t.Helper()
	switch round % 3 {
	case 0:
		d.lost = d.c.peers[round/3%3]
		d.lost.kill()
		time.Sleep(100 * time.Millisecond)
	case 2:
		for _, p := range d.c.peers {
			p.signal(syscall.SIGKILL)
		}
	}
	d.blk.kill()
	if round%3 == 2 {
		for _, p := range d.c.peers {
			p.wait() //nolint:errcheck // it was killed
			p.start(t)
		}
	}
}

func (d *torusDisk) mend(t *testing.T) {
	t.Helper()
	if d.lost != nil {
		d.lost.start(t)
		d.lost = nil
	}
	d.c.waitHealthy(t, startLimit)
}

// lyingDisk is a file behind a server that keeps what is written to itself and answers flushes at once, until it is killed.
type lyingDisk struct {
	dir, image string
	server     *process
	killed     bool
}

func (d *lyingDisk) serve(t *testing.T, honest bool) nbdclient.Address {
	t.Helper()
	a := nbdclient.Unix(filepath.Join(d.dir, "disk.sock"), "")
	os.Remove(a.Addr) //nolint:errcheck // else what is waited for is there already
	args := []string{"nbdkit", "-f", "-U", a.Addr, "file", d.image}
	if !honest {
		args = append(args, "--filter=cache", "cache=unsafe")
	}
	d.server = newProcess(d.dir, "nbdkit", args...)
	d.server.start(t)
	t.Cleanup(d.server.kill)
	dial(t, a, startLimit).Close()
	return a
}

func (d *lyingDisk) end() { d.server.kill() }

func (d *lyingDisk) attach(t *testing.T) nbdclient.Address { return d.serve(t, d.killed) }

func (d *lyingDisk) crash(*testing.T, int) { d.killed = true; d.server.kill() }

func (d *lyingDisk) mend(*testing.T) {}

// commits is the log of one writer: it commits the numbers from 1 on, one after the other.
type commits struct {
	mu    sync.Mutex
	acked int
}

func (c *commits) get() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.acked
}

// check says whether the database holds 1 … n with n at least what was acknowledged, and at most the one that was under
// way; the writer goes on from there.
func (c *commits) check(numbers string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, line := range strings.Fields(numbers) {
		got, err := strconv.Atoi(line)
		if n++; err != nil || got != n {
			return fmt.Errorf("C1: commit %q follows commit %d", line, n-1)
		}
	}
	if n < c.acked {
		return fmt.Errorf("D1: commit %d is the last, but commit %d was acknowledged", n, c.acked)
	}
	if n > c.acked+1 {
		return fmt.Errorf("C1: commit %d is there, but after %d only one more was asked for", n, c.acked)
	}
	c.acked = n
	return nil
}

// feed runs a client of a database that is given one transaction after the other on its standard input and prints the
// number of each once it is committed. It ends when the client fails.
func (c *commits) feed(cmd *exec.Cmd, statement func(n int) string) (wait func(), err error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := startDying(cmd); err != nil {
		return nil, err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(out)
		for n := c.get() + 1; ; n++ {
			if _, err := io.WriteString(in, statement(n)+"\n"); err != nil || !lines.Scan() || lines.Text() != fmt.Sprint(n) {
				break
			}
			c.mu.Lock()
			c.acked = n
			c.mu.Unlock()
		}
		in.Close()
		cmd.Process.Kill() //nolint:errcheck // it may have ended
		cmd.Wait()         //nolint:errcheck // it was killed
	}()
	return func() { <-done }, nil
}

// sqlite is one database with a write-ahead log that is synced at every commit.
type sqlite struct {
	dir string
	log commits
}

const sqliteMode = "PRAGMA synchronous=FULL;"

func (s *sqlite) acked() int { return s.log.get() }

func (s *sqlite) create(t *testing.T, mnt string) error {
	t.Helper()
	out, err := try(t.Context(), "sqlite3", filepath.Join(mnt, "db"), "PRAGMA journal_mode=WAL;"+sqliteMode+`
		CREATE TABLE log(n INTEGER PRIMARY KEY, pad TEXT); CREATE INDEX pads ON log(pad);
		CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER);
		WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM c WHERE i < 999) INSERT INTO account SELECT i, 100 FROM c;`)
	if err == nil && strings.TrimSpace(out) != "wal" {
		err = fmt.Errorf("journal mode is %q", out)
	}
	return err
}

func (s *sqlite) load(_ *testing.T, mnt string) (func(), error) {
	cmd := exec.Command("stdbuf", "-oL", "sqlite3", "-batch", "-bail", filepath.Join(mnt, "db"))
	wait, err := s.log.feed(cmd, func(n int) string {
		mode := ""
		if n == s.log.get()+1 {
			mode = sqliteMode
		}
		return fmt.Sprintf("%s BEGIN; UPDATE account SET balance=balance-1 WHERE id=%d; UPDATE account SET balance=balance+1 WHERE id=%d; INSERT INTO log VALUES(%d, hex(randomblob(200))); COMMIT; SELECT %d;",
			mode, n*7919%1000, n*104729%1000, n, n)
	})
	if err != nil {
		return nil, err
	}
	return func() {
		cmd.Process.Kill() //nolint:errcheck // it may have ended
		wait()
	}, nil
}

func (s *sqlite) check(t *testing.T, mnt string) error {
	t.Helper()
	for query, want := range map[string]string{
		"PRAGMA integrity_check;":           "ok",
		"SELECT sum(balance) FROM account;": "100000",
	} {
		out, err := try(t.Context(), "sqlite3", filepath.Join(mnt, "db"), query)
		if err != nil {
			return err
		}
		if got := strings.TrimSpace(out); got != want {
			return fmt.Errorf("%s %s, not %s", query, clip(got), want)
		}
	}
	out, err := try(t.Context(), "sqlite3", filepath.Join(mnt, "db"), "SELECT n FROM log ORDER BY n;")
	if err != nil {
		return err
	}
	return s.log.check(out)
}

// postgres is a server with checksums, pgbench as load, and writers whose commits are counted.
type postgres struct {
	dir     string
	server  *process
	writers [3]commits
}

// postgresBin is where Debian keeps the programs of a version, which are not on the path.
func postgresBin(t *testing.T, program string) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/" + program)
	if err != nil || len(found) == 0 {
		t.Fatalf("no %s below /usr/lib/postgresql: %v", program, err)
	}
	return found[len(found)-1]
}

// asPostgres runs a command as the user that the server insists on.
func asPostgres(args ...string) []string {
	return append([]string{"setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=KILL", "--"}, args...)
}

func (p *postgres) acked() (n int) {
	for i := range p.writers {
		n += p.writers[i].get()
	}
	return n
}

func (p *postgres) client(t *testing.T, program string, args ...string) []string {
	t.Helper()
	return append([]string{postgresBin(t, program), "-h", p.dir, "-U", "postgres"}, args...)
}

func (p *postgres) create(t *testing.T, mnt string) error {
	t.Helper()
	data := filepath.Join(mnt, "pg")
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	tool(t, "chown", "postgres:", data, p.dir)
	if _, err := try(t.Context(), asPostgres(postgresBin(t, "initdb"), "-D", data, "--data-checksums", "--no-locale", "-E", "UTF8", "-A", "trust", "-U", "postgres")...); err != nil {
		return err
	}
	if err := p.start(t, mnt); err != nil {
		return err
	}
	for _, args := range [][]string{
		p.client(t, "createdb", "bench"),
		p.client(t, "pgbench", "-i", "-q", "-s", "1", "bench"),
		p.client(t, "psql", "-Xqc", "CREATE EXTENSION amcheck; CREATE TABLE log(w int, n int, pad text, PRIMARY KEY (w, n));", "bench"),
	} {
		if _, err := try(t.Context(), args...); err != nil {
			return err
		}
	}
	return p.stop(t)
}

func (p *postgres) start(t *testing.T, mnt string) error {
	t.Helper()
	p.server = newProcess(p.dir, "postgres", asPostgres(postgresBin(t, "postgres"), "-D", filepath.Join(mnt, "pg"), "-k", p.dir, "-c", "listen_addresses=",
		"-c", "shared_buffers=16MB", "-c", "max_wal_size=64MB", "-c", "checkpoint_timeout=30s", "-c", "full_page_writes=on", "-c", "fsync=on")...)
	if err := p.server.tryStart(); err != nil {
		return err
	}
	t.Cleanup(p.kill)
	deadline := time.Now().Add(time.Minute)
	for {
		_, err := try(t.Context(), p.client(t, "psql", "-XqAtc", "SELECT 1", "postgres")...)
		if err == nil {
			return nil
		}
		if !p.server.alive() || time.Now().After(deadline) {
			return fmt.Errorf("postgres does not start: %w\n%s", err, p.server.tail(20))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// kill ends the server at once; it takes its children with it.
func (p *postgres) kill() {
	p.server.signal(syscall.SIGQUIT)
	p.server.wait() //nolint:errcheck // it was told to crash
}

func (p *postgres) stop(t *testing.T) error {
	p.server.signal(syscall.SIGINT)
	if err := p.server.wait(); err != nil {
		return fmt.Errorf("postgres: %w\n%s", err, p.server.tail(20))
	}
	return nil
}

func (p *postgres) load(t *testing.T, mnt string) (func(), error) {
	if err := p.start(t, mnt); err != nil {
		return nil, err
	}
	bench := newProcess(p.dir, "pgbench", p.client(t, "pgbench", "-n", "-c", "2", "-T", "3600", "bench")...)
	if err := bench.tryStart(); err != nil {
		return nil, err
	}
	var waits []func()
	for w := range p.writers {
		args := p.client(t, "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "bench")
		wait, err := p.writers[w].feed(exec.Command(args[0], args[1:]...), func(n int) string {
			return fmt.Sprintf("INSERT INTO log VALUES(%d, %d, repeat('x', 200)) RETURNING n;", w, n)
		})
		if err != nil {
			return nil, err
		}
		waits = append(waits, wait)
	}
	return func() {
		p.kill()
		bench.kill()
		for _, wait := range waits {
			wait()
		}
	}, nil
}

func (p *postgres) check(t *testing.T, mnt string) error {
	t.Helper()
	if err := p.start(t, mnt); err != nil {
		return err
	}
	defer p.kill()
	for w := range p.writers {
		out, err := try(t.Context(), p.client(t, "psql", "-XqAtc", fmt.Sprintf("SELECT n FROM log WHERE w=%d ORDER BY n", w), "bench")...)
		if err == nil {
			err = p.writers[w].check(out)
		}
		if err != nil {
			return fmt.Errorf("writer %d: %w", w, err)
		}
	}
	// pgbench moves the same amounts in four tables.
	out, err := try(t.Context(), p.client(t, "psql", "-XqAtc", `SELECT count(DISTINCT s) FROM (SELECT sum(abalance) s FROM pgbench_accounts UNION ALL SELECT sum(tbalance) FROM pgbench_tellers
		UNION ALL SELECT sum(bbalance) FROM pgbench_branches UNION ALL SELECT coalesce(sum(delta), 0) FROM pgbench_history) x`, "bench")...)
	if err != nil {
		return err
	}
	if strings.TrimSpace(out) != "1" {
		return fmt.Errorf("C1: part of a transaction: %s sums in four tables", strings.TrimSpace(out))
	}
	if _, err := try(t.Context(), p.client(t, "pg_amcheck", "--heapallindexed", "bench")...); err != nil {
		return err
	}
	if err := p.stop(t); err != nil {
		return err
	}
	_, err = try(t.Context(), asPostgres(postgresBin(t, "pg_checksums"), "--check", "-D", filepath.Join(mnt, "pg"))...)
	return err
}
