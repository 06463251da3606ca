// Package buftest has what tests of those who exchange buffers share.
package buftest

import "github.com/coreos/torus/buf"

// Exchange puts another buffer in the place of *b, of which *data is the beginning, as whoever answers a read may. The one that was there is overwritten,
// in case that somebody still looks there, and released. Nothing happens if *b is nil: then there is none to be exchanged.
func Exchange(b **buf.Buf, data *[]byte) {
	was := *b
	if was == nil {
		return
	}
	*b = buf.Get(len(*data))
	*data = (*b).Bytes()[:len(*data)]
	for i := range was.Bytes() {
		was.Bytes()[i] = 0xdb
	}
	was.Release()
}
