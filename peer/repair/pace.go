package repair

import "time"

// pace bounds a rate. The zero value bounds nothing.
type pace struct {
	perSec uint64 // bytes, or what else is counted
	next   time.Duration
}

// take returns how long to wait, at loop time now, before n more. What was not used in the past is not saved up.
func (p *pace) take(now time.Duration, n int) time.Duration {
	if p.perSec == 0 {
		return 0
	}
	p.next = max(p.next, now)
	wait := p.next - now
	p.next += time.Duration(uint64(n) * uint64(time.Second) / p.perSec)
	return wait
}
