package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
)

// An attempt is one exchange with one etcd member; a member that does not answer within attemptTimeout may be dead, and the
// next attempt goes to another. Between attempts we wait, longer each time.
const (
	attemptTimeout = 2 * time.Second
	firstWait      = 20 * time.Millisecond
	longestWait    = 500 * time.Millisecond
)

// errRaced is what an attempt returns when something it had read was changed before it wrote: it is made again at once.
var errRaced = errors.New("changed meanwhile")

// rpcError is an error of the exchange itself, as opposed to an answer.
type rpcError struct{ err error }

func (e *rpcError) Error() string { return e.err.Error() }
func (e *rpcError) Unwrap() error { return e.err }

// The classes of rpcErrors.
type outcome int

const (
	unknown outcome = iota // it may have been carried out, or may yet be
	notDone                // it was not; another try may succeed
	refused                // it was not, and will not be
)

// classify tells what an error says about the request, and the error to return if it is refused.
func classify(err error) (outcome, error) {
	var e rpctypes.EtcdError
	if errors.As(rpctypes.Error(err), &e) {
		switch e {
		case rpctypes.ErrLeaseNotFound:
			return refused, torus.ErrLeaseNotFound
		case rpctypes.ErrNoSpace:
			return refused, fmt.Errorf("%w in etcd's database (compact and defragment it, then `etcdctl alarm disarm`)", torus.ErrOutOfSpace)
		case rpctypes.ErrTooManyRequests:
			return notDone, err
		}
		switch e.Code() {
		case codes.InvalidArgument, codes.OutOfRange, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.NotFound:
			return refused, err
		}
		return unknown, err
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented, codes.ResourceExhausted:
		return refused, err
	}
	return unknown, err
}

// read makes attempts until one gets an answer.
func (c *Client) read(ctx context.Context, method, what string, attempt func(context.Context) error) error {
	return c.write(ctx, method, what, func(ctx context.Context, _ bool) error { return attempt(ctx) })
}

// write makes attempts until the outcome is known or the time is over. An attempt reads what it is going to
// replace, then writes on condition that it is still that. again says that an earlier attempt may have succeeded, so that what
// it reads may be its own doing. An earlier attempt that arrives late finds its condition broken by whatever succeeded since.
func (c *Client) write(ctx context.Context, method, what string, attempt func(ctx context.Context, again bool) error) error {
	c.metrics.ops.WithLabelValues(method).Inc()
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RequestTimeout)
	defer cancel()
	again := false
	wait := firstWait
	var last error // why an exchange brought no answer, other than that time was over
	for ctx.Err() == nil && c.closed.Err() == nil {
		actx, cancel := context.WithTimeout(ctx, attemptTimeout)
		err := attempt(actx, again)
		cancel()
		var rpc *rpcError
		switch {
		case err == nil:
			return nil
		case errors.Is(err, errRaced):
			c.metrics.retries.WithLabelValues(method).Inc()
			continue
		case !errors.As(err, &rpc):
			return c.fail(method, what, err, "") // an answer, though not the one hoped for
		}
		o, meaning := classify(rpc.err)
		if o == refused {
			return c.fail(method, what, meaning, "")
		}
		again = again || o == unknown
		if !errors.Is(rpc.err, context.DeadlineExceeded) && !errors.Is(rpc.err, context.Canceled) {
			last = rpc.err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		case <-c.closed.Done():
		}
		wait = min(2*wait, longestWait)
	}
	if c.closed.Err() != nil {
		return c.fail(method, what, fmt.Errorf("metadata service: %w", torus.ErrClosed), "")
	}
	c.metrics.failures.WithLabelValues(method).Inc()
	why := outer.Err()
	if why == nil {
		why = fmt.Errorf("no answer within %v", c.cfg.RequestTimeout)
	}
	if last != nil {
		why = fmt.Errorf("%w (%s)", why, reason(last))
	}
	return c.fail(method, what, fmt.Errorf("%w: etcd at %s: %w", torus.ErrMetadataUnavailable, c.endpoints(), why), c.hint())
}

func (c *Client) endpoints() string { return strings.Join(c.cfg.Endpoints, ",") }

func (c *Client) hint() string {
	return "Is etcd running? Ask it: etcdctl --endpoints=" + c.endpoints() + " endpoint health"
}

// fail names the method and object of an error that does not yet.
func (c *Client) fail(method, what string, err error, hint string) error {
	var named *torus.Error
	if errors.As(err, &named) || errors.Is(err, torus.ErrNoGlobalMetadata) {
		return err
	}
	return &torus.Error{Op: method, Obj: what, Err: err, Hint: hint}
}

// whyNotConnected keeps the reason why there was no connection until a call's time was over: clientv3 waits for one, and
// would tell of the time alone.
func whyNotConnected(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	if _, why, ok := strings.Cut(status.Convert(err).Message(), "latest balancer error: "); ok {
		return status.Error(codes.Unavailable, why)
	}
	return err
}

// reason is what gRPC means to say.
func reason(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

// get reads keys, the newest there is.
func (c *Client) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	resp, err := c.etcd.Get(ctx, key, opts...)
	if err != nil {
		return nil, &rpcError{err}
	}
	return resp, nil
}

func (c *Client) txn(ctx context.Context, cmps []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	resp, err := c.etcd.Txn(ctx).If(cmps...).Then(then...).Else(otherwise...).Commit()
	if err != nil {
		return nil, &rpcError{err}
	}
	return resp, nil
}

// getBoth reads two keys at one revision; nil for what is absent.
func (c *Client) getBoth(ctx context.Context, a, b string) (x, y *mvccpb.KeyValue, err error) {
	resp, err := c.txn(ctx, nil, []clientv3.Op{clientv3.OpGet(a), clientv3.OpGet(b)}, nil)
	if err != nil {
		return nil, nil, err
	}
	return found(resp, 0), found(resp, 1), nil
}

// found returns what the i-th operation of a transaction, the read of one key, found.
func found(resp *clientv3.TxnResponse, i int) *mvccpb.KeyValue {
	if i >= len(resp.Responses) {
		return nil
	}
	r, ok := resp.Responses[i].Response.(*etcdserverpb.ResponseOp_ResponseRange)
	if !ok || len(r.ResponseRange.Kvs) == 0 {
		return nil
	}
	return r.ResponseRange.Kvs[0]
}

func value(resp *clientv3.TxnResponse, i int) []byte { return found(resp, i).GetValue() }

func absent(key string) clientv3.Cmp { return clientv3.Compare(clientv3.CreateRevision(key), "=", 0) }

func present(key string) clientv3.Cmp { return clientv3.Compare(clientv3.CreateRevision(key), ">", 0) }

// unchanged holds while key is as it was read; kv nil: absent.
func unchanged(key string, kv *mvccpb.KeyValue) clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(key), "=", kv.GetModRevision())
}

func decode(kv *mvccpb.KeyValue, m proto.Message) error {
	if err := proto.Unmarshal(kv.Value, m); err != nil {
		return fmt.Errorf("etcd key %s: %w: %v (written by something other than Torus?)", kv.Key, torus.ErrCorrupt, err)
	}
	return nil
}
