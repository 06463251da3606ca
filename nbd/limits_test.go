package nbd

import (
	"errors"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coreos/torus/device"
)

// hold makes the disk finish nothing until told.
func (r *rig) hold() *held {
	h := &held{}
	r.disk.Deliver = func(_ *device.Request, f func()) { h.finish = append(h.finish, f) }
	return h
}

func (h *held) next() {
	f := h.finish[0]
	h.finish = h.finish[1:]
	f()
}

func TestRequestsInFlightAreBounded(t *testing.T) {
	r := newRig(t, Config{MaxInFlight: 4})
	c := r.attached("disk", simply)
	h := r.hold()
	const n = 20
	for i := range uint64(n) {
		c.request(0, cmdRead, i, i, 1)
	}
	if len(h.finish) != 4 || !c.st.paused {
		t.Fatalf("%d requests under way, paused %v", len(h.finish), c.st.paused)
	}
	for done := 0; done < n; done++ {
		if len(h.finish) > 4 {
			t.Fatalf("%d requests under way", len(h.finish))
		}
		h.next()
		r.run()
	}
	for i := range uint64(n) {
		c.simple(0, i, byte(0))
	}
	if c.silent(); c.st.paused {
		t.Error("still paused")
	}
}

func TestBytesInFlightAreBounded(t *testing.T) {
	r := newRig(t, Config{MaxSessionBytes: 100 << 10})
	c := r.attached("disk", simply)
	h := r.hold()
	for i := range uint64(20) {
		c.request(0, cmdRead, i, 0, 40<<10)
	}
	if len(h.finish) != 3 {
		t.Fatalf("%d requests of 40 KiB under way", len(h.finish))
	}
	for i := range uint64(20) {
		h.next()
		r.run()
		c.simple(0, i, make([]byte, 40<<10))
	}
}

// A client that sends requests and never reads its replies costs a bounded amount of memory, and is served again when it
// reads at last, though nothing tells the session.
func TestClientThatNeverReads(t *testing.T) {
	r := newRig(t, Config{MaxSessionBytes: 100 << 10})
	c := r.attached("disk", simply)
	c.st.stuck = true
	for i := range uint64(50) {
		c.request(0, cmdRead, i, 0, 10<<10)
	}
	if c.st.queued > 110<<10 || !c.st.paused {
		t.Fatalf("%d bytes queued, paused %v", c.st.queued, c.st.paused)
	}
	r.v.RunFor(time.Hour)
	if c.st.queued > 110<<10 {
		t.Fatalf("%d bytes queued", c.st.queued)
	}
	for i := range uint64(50) {
		r.eventually("the next replies", func() bool { return len(c.st.out) > 0 })
		c.simple(0, i, make([]byte, 10<<10))
		c.st.queued = len(c.st.out)
	}
	c.silent()
}

// The same in the handshake.
func TestClientThatNeverReadsInHandshake(t *testing.T) {
	r := newRig(t, Config{})
	c := r.dial().greeted(3)
	c.st.stuck = true
	for range 5000 {
		c.option(optList)
	}
	if c.st.queued > handshakeBytes+100 || !c.st.paused {
		t.Fatalf("%d bytes queued, paused %v", c.st.queued, c.st.paused)
	}
}

func TestBytesOfAllSessionsAreBounded(t *testing.T) {
	r := newRig(t, Config{MaxServerBytes: 100 << 10})
	h := r.hold()
	var clients []*client
	for range 5 {
		clients = append(clients, r.attached("disk", simply))
	}
	for _, c := range clients {
		for i := range uint64(7) {
			c.request(0, cmdRead, i, 0, 10<<10)
		}
	}
	if len(h.finish) != 10 {
		t.Fatalf("%d requests of 10 KiB under way", len(h.finish))
	}
	for i := 0; i < 35; i++ {
		r.eventually("a request is let in", func() bool { return len(h.finish) > 0 })
		if len(h.finish) > 10 {
			t.Fatalf("%d requests under way", len(h.finish))
		}
		h.next()
	}
	for _, c := range clients {
		for i := range uint64(7) {
			c.simple(0, i, make([]byte, 10<<10))
		}
	}
}

func TestSessionsAreBounded(t *testing.T) {
	r := newRig(t, Config{MaxSessions: 2})
	a := r.dial()
	r.dial()
	st := &fakeStream{l: r.l, split: 1}
	st.h = r.srv.accept(st)
	st.h.Opened(st)
	r.run()
	if !st.closed || len(st.out) > 0 {
		t.Error("a third client was let in")
	}
	a.st.shut(nil)
	r.run()
	r.dial().greeted(3).alive()
}

// Whatever the client is doing when it goes, the device is given back once, when nothing is under way any more.
func TestClientGoes(t *testing.T) {
	for name, x := range map[string]struct {
		do    func(c *client)
		under int
	}{
		"idle":             {func(*client) {}, 0},
		"half a header":    {func(c *client) { c.send(uint32(magicRequest), "xyz") }, 0},
		"half a payload":   {func(c *client) { c.request(0, cmdWrite, 1, 0, 100000, make([]byte, 50000)) }, 0},
		"little payload":   {func(c *client) { c.request(0, cmdWrite, 1, 0, 1000, make([]byte, 500)) }, 0},
		"half a refused":   {func(c *client) { c.request(0, cmdWrite, 1, diskSize, 100000, make([]byte, 50000)) }, 0},
		"requests":         {func(c *client) { c.request(0, cmdRead, 1, 0, 1000); c.request(0, cmdWrite, 2, 0, 1, "x") }, 2},
		"request and half": {func(c *client) { c.request(0, cmdFlush, 1, 0, 0); c.request(0, cmdWrite, 1, 0, 100000, "x") }, 1},
		"disconnected":     {func(c *client) { c.request(0, cmdFlush, 1, 0, 0); c.request(0, cmdDisc, 2, 0, 0) }, 1},
	} {
		for _, violation := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				r := newRig(t, Config{})
				c := r.attached("disk", structured)
				h := r.hold()
				x.do(c)
				if violation {
					r.srv.sessions[0].fail("test")
				} else {
					c.st.shut(errors.New("connection reset"))
				}
				r.run()
				if len(h.finish) != x.under {
					t.Fatalf("%d requests under way", len(h.finish))
				}
				for range x.under {
					if r.dir.Attached["disk"] != 1 || r.srv.Sessions() != 1 {
						t.Error("given back with a request under way")
					}
					h.next()
				}
				r.run()
				if r.dir.Attached["disk"] != 0 || r.srv.Sessions() != 0 {
					t.Errorf("attached %d times, %d sessions", r.dir.Attached["disk"], r.srv.Sessions())
				}
				c.silent()
			})
		}
	}
}

// A client may go, run out of time, or be shut down while the Directory is still thinking about its option. An
// attach that succeeds afterwards is undone.
func TestDirectoryIsSlow(t *testing.T) {
	options := map[string]func(c *client){
		"LIST":        func(c *client) { c.option(optList) },
		"INFO":        func(c *client) { c.option(optInfo, named(""), uint16(0)) },
		"GO":          func(c *client) { c.option(optGo, named(""), uint16(0)) },
		"EXPORT_NAME": func(c *client) { c.option(optExportName, "") },
		"CONTEXT":     func(c *client) { c.option(optListMetaContext, named("disk"), uint32(0)) },
	}
	events := map[string]func(c *client, done *bool){
		"patience": func(c *client, _ *bool) { c.v.RunFor(10 * time.Minute) },
		"gone":     func(c *client, _ *bool) { c.st.shut(nil) },
		"shutdown": func(c *client, done *bool) { c.srv.Shutdown(func() { *done = true }) },
		"cut off":  func(c *client, done *bool) { c.srv.Shutdown(func() { *done = true }); c.v.RunFor(time.Minute) },
	}
	for option, ask := range options {
		for event, happens := range events {
			for after := range 3 {
				t.Run(option+"/"+event, func(t *testing.T) {
					r := newRig(t, Config{})
					c := r.dial().greeted(3)
					c.option(optStructuredReply)
					c.rep(optStructuredReply, repAck)
					var answers []func()
					r.dir.Deliver = func(f func()) { answers = append(answers, f) }
					ask(c)
					c.silent()
					for range after { // the event strikes after the first, second … question to the Directory
						if len(answers) > 0 {
							f := answers[0]
							answers = answers[1:]
							f()
							r.run()
						}
					}
					if len(answers) == 0 { // answered completely
						return
					}
					done := false
					happens(c, &done)
					if r.run(); r.srv.Sessions() != 1 || done {
						t.Fatal("the session ended with a question open")
					}
					for len(answers) > 0 {
						f := answers[0]
						answers = answers[1:]
						f()
						r.run()
					}
					switch event {
					case "patience":
						c.alive()
						if len(c.st.out) == 0 {
							t.Error("no answer")
						}
						return
					case "shutdown":
						if option == "EXPORT_NAME" {
							break
						}
						c.alive()
						c.expect(uint64(magicOptReply))
						c.recv(4)
						c.expect(uint32(repErrShutdown))
						c.st.shut(nil)
					}
					r.run()
					if r.dir.Attached["disk"] != 0 || r.srv.Sessions() != 0 {
						t.Errorf("attached %d times, %d sessions", r.dir.Attached["disk"], r.srv.Sessions())
					}
					if (event == "shutdown" || event == "cut off") && !done {
						t.Error("Shutdown is not done")
					}
				})
			}
		}
	}
}

// A client that takes nothing, not even its last replies, is cut off by Shutdown in the end.
func TestShutdownCutsOff(t *testing.T) {
	r := newRig(t, Config{})
	c := r.attached("disk", simply)
	c.st.stuck = true
	h := r.hold()
	c.request(0, cmdRead, 1, 0, 1000)
	done := 0
	r.srv.Shutdown(func() { done++ })
	r.srv.Shutdown(func() { done++ })
	h.next()
	if r.run(); done != 0 {
		t.Error("done before the client has its replies")
	}
	r.v.RunFor(5 * time.Second)
	if r.run(); done != 2 || r.dir.Attached["disk"] != 0 {
		t.Errorf("done %d times, attached %d times", done, r.dir.Attached["disk"])
	}
}

func TestShutdownOfNothing(t *testing.T) {
	r := newRig(t, Config{})
	done := false
	r.srv.Shutdown(func() { done = true })
	if r.run(); !done {
		t.Error("not done")
	}
	st := &fakeStream{l: r.l}
	st.h = r.srv.accept(st)
	st.h.Opened(st)
	if !st.closed {
		t.Error("a client was let in after Shutdown")
	}
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	r := newRig(t, Config{Registerer: reg})
	if _, err := newServer(r.l, Config{Registerer: reg}); err != nil {
		t.Fatal("a second server: ", err)
	}
	c := r.attached("disk", simply)
	h := r.hold()
	c.request(0, cmdWrite, 1, 0, 512, make([]byte, 512))
	r.v.RunFor(3 * time.Millisecond)
	h.next()
	c.request(0, cmdRead, 2, diskSize, 1)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			key := f.GetName()
			for _, l := range m.Label {
				key += " " + l.GetValue()
			}
			switch {
			case m.Histogram != nil:
				for _, b := range m.Histogram.Bucket {
					if b.GetCumulativeCount() > 0 {
						got[key+" first bucket"] = b.GetUpperBound()
						break
					}
				}
				got[key+" sum"] = m.Histogram.GetSampleSum()
			case m.Counter != nil:
				got[key] = m.Counter.GetValue()
			default:
				got[key] = m.Gauge.GetValue()
			}
		}
	}
	for key, want := range map[string]float64{
		"torus_nbd_requests_total write": 1, "torus_nbd_bytes_total write": 512, "torus_nbd_errors_total write": 0,
		"torus_nbd_requests_total read": 0, "torus_nbd_refused_total": 1, "torus_nbd_sessions": 1, "torus_nbd_violations_total": 0,
		"torus_nbd_request_seconds write sum": 0.003, "torus_nbd_request_seconds write first bucket": 4096e-6,
	} {
		if v, ok := got[key]; !ok || v != want {
			t.Errorf("%s is %v, not %v", key, v, want)
		}
	}
}

func TestBucketOf(t *testing.T) {
	for d, want := range map[time.Duration]int{0: 0, time.Microsecond: 0, 1001: 1, 2000: 1, 2001: 2, 4 * time.Microsecond: 2, 17 * time.Second: 25, time.Hour: 25} {
		if got := bucketOf(d); got != want {
			t.Errorf("%v is in bucket %d, not %d", d, got, want)
		}
	}
}
