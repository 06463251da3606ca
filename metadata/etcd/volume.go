package etcd

import (
	"context"
	"crypto/rand"
	"fmt"
	"strconv"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	"github.com/coreos/torus"
	"github.com/coreos/torus/metadata"
	"github.com/coreos/torus/models"
)

func volumeName(id torus.VolumeID) string { return fmt.Sprintf("volume %x", uint64(id)) }

func (c *Client) CreateVolume(ctx context.Context, v *models.Volume) error {
	if err := metadata.CheckVolumeName(v.GetName()); err != nil {
		return err
	}
	m := proto.CloneOf(v)
	key := c.keys.volume(m.Name)
	// By the mark a lost success is told from somebody else's volume of that name.
	mark := m.Name + " " + rand.Text()
	err := c.write(ctx, "CreateVolume", "volume "+m.Name, func(ctx context.Context, again bool) error {
		minter, have, err := c.getBoth(ctx, c.keys.volumeMinter(), key)
		if err != nil {
			return err
		}
		if have != nil {
			var old models.Volume
			if err := decode(have, &old); err != nil {
				return err
			}
			if again {
				resp, err := c.get(ctx, c.keys.volumeID(torus.VolumeID(old.Id)))
				if err != nil {
					return err
				}
				if len(resp.Kvs) == 1 && string(resp.Kvs[0].Value) == mark {
					m.Id = old.Id
					return nil
				}
			}
			return torus.ErrExists
		}
		var last uint64
		if minter != nil {
			if last, err = strconv.ParseUint(string(minter.Value), 10, 64); err != nil {
				return fmt.Errorf("etcd key %s: %w: %v", minter.Key, torus.ErrCorrupt, err)
			}
		}
		if last >= uint64(torus.VolumeMax) {
			return fmt.Errorf("volume ids: %w", torus.ErrOutOfSpace)
		}
		m.Id = last + 1
		stored, err := proto.Marshal(m)
		if err != nil {
			return fmt.Errorf("%v: %w", err, torus.ErrInvalid)
		}
		id := torus.VolumeID(m.Id)
		resp, err := c.txn(ctx,
			[]clientv3.Cmp{present(c.keys.global()), absent(key), unchanged(c.keys.volumeMinter(), minter)},
			[]clientv3.Op{
				clientv3.OpPut(c.keys.volumeMinter(), strconv.FormatUint(m.Id, 10)),
				clientv3.OpPut(key, string(stored)),
				clientv3.OpPut(c.keys.volumeID(id), mark),
				clientv3.OpPut(c.keys.state(id), ""), // an empty VolumeState
			},
			[]clientv3.Op{clientv3.OpGet(c.keys.global())})
		switch {
		case err != nil || resp.Succeeded:
			return err
		case found(resp, 0) == nil:
			return torus.ErrNoGlobalMetadata
		}
		return errRaced
	})
	if err == nil {
		v.Id = m.Id
	}
	return err
}

func (c *Client) Volume(ctx context.Context, name string) (*models.Volume, error) {
	v := &models.Volume{}
	err := c.read(ctx, "Volume", "volume "+name, func(ctx context.Context) error {
		resp, err := c.get(ctx, c.keys.volume(name))
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return torus.ErrNotExist
		}
		return decode(resp.Kvs[0], v)
	})
	if err != nil {
		return nil, err
	}
	return v, nil
}

func (c *Client) Volumes(ctx context.Context) ([]*models.Volume, error) {
	var list []*models.Volume
	err := c.read(ctx, "Volumes", "", func(ctx context.Context) error {
		from, end := c.keys.volumes()
		resp, err := c.get(ctx, from, clientv3.WithRange(end)) // in order of the keys, that is of the names
		if err != nil {
			return err
		}
		list = make([]*models.Volume, len(resp.Kvs))
		for i, kv := range resp.Kvs {
			list[i] = &models.Volume{}
			if err := decode(kv, list[i]); err != nil {
				return err
			}
		}
		return nil
	})
	return list, err
}

func (c *Client) UpdateVolume(ctx context.Context, name string, change func(*models.Volume) error) error {
	key := c.keys.volume(name)
	var lost *models.Volume // what may have been made of it when an answer was lost
	return c.write(ctx, "UpdateVolume", "volume "+name, func(ctx context.Context, again bool) error {
		resp, err := c.get(ctx, key)
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			if again && lost != nil {
				if now, err := c.get(ctx, c.keys.volume(lost.Name)); err == nil && len(now.Kvs) == 1 {
					var v models.Volume
					if decode(now.Kvs[0], &v) == nil && v.Id == lost.Id {
						return nil
					}
				}
			}
			return torus.ErrNotExist
		}
		from := &models.Volume{}
		if err := decode(resp.Kvs[0], from); err != nil {
			return err
		}
		to := proto.CloneOf(from)
		if err := change(to); err != nil {
			return err
		}
		if err := metadata.CheckUpdate(from, to); err != nil {
			return err
		}
		stored, err := proto.Marshal(to)
		if err != nil {
			return fmt.Errorf("%v: %w", err, torus.ErrInvalid)
		}
		lost = to
		cmps := []clientv3.Cmp{unchanged(key, resp.Kvs[0])}
		ops := []clientv3.Op{clientv3.OpPut(c.keys.volume(to.Name), string(stored))}
		if to.Name != name {
			cmps = append(cmps, absent(c.keys.volume(to.Name)))
			ops = append(ops, clientv3.OpDelete(key), clientv3.OpPut(c.keys.volumeID(torus.VolumeID(to.Id)), to.Name+" "))
		}
		done, err := c.txn(ctx, cmps, ops, []clientv3.Op{clientv3.OpGet(c.keys.volume(to.Name))})
		switch {
		case err != nil || done.Succeeded:
			return err
		case to.Name != name && found(done, 0) != nil:
			return fmt.Errorf("volume %s: %w", to.Name, torus.ErrExists)
		}
		return errRaced
	})
}

func (c *Client) DeleteVolume(ctx context.Context, name string) error {
	key := c.keys.volume(name)
	return c.write(ctx, "DeleteVolume", "volume "+name, func(ctx context.Context, again bool) error {
		resp, err := c.get(ctx, key)
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			if again {
				return nil
			}
			return torus.ErrNotExist
		}
		var v models.Volume
		if err := decode(resp.Kvs[0], &v); err != nil {
			return err
		}
		id := torus.VolumeID(v.Id)
		from, end := c.keys.volumeMeta(id)
		done, err := c.txn(ctx,
			[]clientv3.Cmp{unchanged(key, resp.Kvs[0]), absent(c.keys.lock(id))},
			[]clientv3.Op{
				clientv3.OpDelete(key),
				clientv3.OpDelete(c.keys.volumeID(id)),
				clientv3.OpDelete(from, clientv3.WithRange(end)),
			},
			[]clientv3.Op{clientv3.OpGet(c.keys.lock(id))})
		if err != nil || done.Succeeded {
			return err
		}
		if lock := found(done, 0); lock != nil {
			h := &models.Holder{}
			if err := decode(lock, h); err != nil {
				return err
			}
			return metadata.Locked("DeleteVolume", "volume "+name, h)
		}
		return errRaced
	})
}

func decodeState(kv *mvccpb.KeyValue) (torus.VolumeState, error) {
	s := torus.VolumeState{VolumeState: &models.VolumeState{}, Revision: kv.ModRevision}
	if err := decode(kv, s.VolumeState); err != nil {
		return torus.VolumeState{}, err
	}
	return s, nil
}

// stateAndHolder reads both at one revision. The lock is nil if nobody holds the volume.
func (c *Client) stateAndHolder(ctx context.Context, id torus.VolumeID) (s torus.VolumeState, state, lock *mvccpb.KeyValue, h *models.Holder, err error) {
	if state, lock, err = c.getBoth(ctx, c.keys.state(id), c.keys.lock(id)); err != nil {
		return
	}
	if state == nil {
		err = torus.ErrNotExist
		return
	}
	if s, err = decodeState(state); err != nil || lock == nil {
		return
	}
	h = &models.Holder{}
	err = decode(lock, h)
	return
}

func (c *Client) VolumeState(ctx context.Context, id torus.VolumeID) (torus.VolumeState, error) {
	var s torus.VolumeState
	err := c.read(ctx, "VolumeState", volumeName(id), func(ctx context.Context) error {
		resp, err := c.get(ctx, c.keys.state(id))
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return torus.ErrNotExist
		}
		s, err = decodeState(resp.Kvs[0])
		return err
	})
	return s, err
}

func (c *Client) VolumeStates(ctx context.Context, after torus.VolumeID, limit int) (torus.VolumeStates, error) {
	var page torus.VolumeStates
	err := c.read(ctx, "VolumeStates", "", func(ctx context.Context) error {
		from, end := c.keys.statesAfter(after)
		// A lock comes right before the state of its volume: a page of so many keys has at least limit/2 states.
		resp, err := c.txn(ctx, nil, []clientv3.Op{
			clientv3.OpGet(c.keys.global()), clientv3.OpGet(c.keys.volumeMinter()),
			clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(int64(limit)+1)),
		}, nil)
		if err != nil {
			return err
		}
		page = torus.VolumeStates{}
		stored := found(resp, 0)
		if stored == nil {
			return torus.ErrNoGlobalMetadata
		}
		var g models.Global
		if err := decode(stored, &g); err != nil {
			return err
		}
		page.ClusterID = g.ClusterId
		if minter := found(resp, 1); minter != nil {
			last, err := strconv.ParseUint(string(minter.Value), 10, 64)
			if err != nil {
				return fmt.Errorf("etcd key %s: %w: %v", minter.Key, torus.ErrCorrupt, err)
			}
			page.LastID = torus.VolumeID(last)
		}
		got := resp.Responses[2].GetResponseRange()
		page.More = got.More
		for _, kv := range got.Kvs {
			id, ok := c.keys.stateOf(string(kv.Key))
			if !ok {
				continue
			}
			if len(page.List) == limit {
				page.More = true
				break
			}
			s, err := decodeState(kv)
			page.List = append(page.List, torus.ListedState{ID: id, VolumeState: s, Err: err})
		}
		return nil
	})
	if err != nil {
		return torus.VolumeStates{}, err
	}
	return page, nil
}

func (c *Client) Holder(ctx context.Context, id torus.VolumeID) (*models.Holder, error) {
	var h *models.Holder
	err := c.read(ctx, "Holder", volumeName(id), func(ctx context.Context) (err error) {
		_, _, _, h, err = c.stateAndHolder(ctx, id)
		return err
	})
	return h, err
}

// Attach may use up more than one epoch if answers are lost: an epoch nobody learned of does no harm.
func (c *Client) Attach(ctx context.Context, id torus.VolumeID, lease torus.LeaseID, h *models.Holder, force bool) (torus.VolumeState, error) {
	if lease == 0 {
		return torus.VolumeState{}, c.fail("Attach", volumeName(id), fmt.Errorf("lease 0: %w", torus.ErrLeaseNotFound), "")
	}
	var attached torus.VolumeState
	err := c.write(ctx, "Attach", volumeName(id), func(ctx context.Context, _ bool) error {
		s, state, lock, held, err := c.stateAndHolder(ctx, id)
		if err != nil {
			return err
		}
		if lock != nil && lock.Lease != int64(lease) && !force {
			return metadata.Locked("Attach", volumeName(id), held)
		}
		s.Epoch++
		stored, err := proto.Marshal(s.VolumeState)
		if err != nil {
			return fmt.Errorf("%v: %w", err, torus.ErrInvalid)
		}
		holder, err := proto.Marshal(metadata.HolderAt(h, s.Epoch))
		if err != nil {
			return fmt.Errorf("%v: %w", err, torus.ErrInvalid)
		}
		resp, err := c.txn(ctx,
			[]clientv3.Cmp{unchanged(c.keys.state(id), state), unchanged(c.keys.lock(id), lock)},
			[]clientv3.Op{
				clientv3.OpPut(c.keys.state(id), string(stored)),
				clientv3.OpPut(c.keys.lock(id), string(holder), clientv3.WithLease(clientv3.LeaseID(lease))),
			}, nil)
		if err != nil {
			return err
		}
		if !resp.Succeeded {
			return errRaced
		}
		s.Revision = resp.Header.Revision
		attached = s
		return nil
	})
	return attached, err
}

// Commit is one round trip. If its answer is lost the state tells whether it was made (metadata.Settle).
func (c *Client) Commit(ctx context.Context, id torus.VolumeID, from torus.VolumeState, to *models.VolumeState) (torus.VolumeState, error) {
	next, err := metadata.NextState(from, to)
	if err != nil {
		return torus.VolumeState{}, c.fail("Commit", volumeName(id), err, "")
	}
	return c.replace(ctx, "Commit", id, from, next, func(now torus.VolumeState) metadata.Fate { return metadata.Settle(from, next, now) })
}

// Amend is one round trip. If its answer is lost, and the state is not what it was meant to be, it counts as not made.
func (c *Client) Amend(ctx context.Context, id torus.VolumeID, from torus.VolumeState, to *models.VolumeState) (torus.VolumeState, error) {
	next, err := metadata.AmendedState(from, to)
	if err != nil {
		return torus.VolumeState{}, c.fail("Amend", volumeName(id), err, "")
	}
	return c.replace(ctx, "Amend", id, from, next, func(now torus.VolumeState) metadata.Fate {
		if proto.Equal(now.VolumeState, next) {
			return metadata.Made
		}
		return metadata.Void
	})
}

// replace makes next the state if nothing has changed since from was read; fate tells, when an answer was lost, what became of that.
func (c *Client) replace(ctx context.Context, op string, id torus.VolumeID, from torus.VolumeState, next *models.VolumeState, fate func(torus.VolumeState) metadata.Fate) (torus.VolumeState, error) {
	stored, err := proto.Marshal(next)
	if err != nil {
		return torus.VolumeState{}, c.fail(op, volumeName(id), fmt.Errorf("%v: %w", err, torus.ErrInvalid), "")
	}
	key := c.keys.state(id)
	var made torus.VolumeState
	err = c.write(ctx, op, volumeName(id), func(ctx context.Context, again bool) error {
		resp, err := c.txn(ctx,
			[]clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", from.Revision), present(key)},
			[]clientv3.Op{clientv3.OpPut(key, string(stored))},
			[]clientv3.Op{clientv3.OpGet(key)})
		if err != nil {
			return err
		}
		if resp.Succeeded {
			made = torus.VolumeState{VolumeState: next, Revision: resp.Header.Revision}
			return nil
		}
		kv := found(resp, 0)
		if kv == nil {
			return torus.ErrNotExist
		}
		now, err := decodeState(kv)
		if err != nil {
			return err
		}
		failed := metadata.CompareFailed(volumeName(id), from, now)
		if !again {
			return failed
		}
		switch fate(now) {
		case metadata.Made:
			if now.Epoch == from.GetEpoch() {
				made = now
				return nil
			}
			return fmt.Errorf("%w; it was made before that", failed)
		case metadata.Unclear:
			return fmt.Errorf("%w; whether it was made before that is not known: %w", failed, torus.ErrMetadataUnavailable)
		}
		return failed
	})
	return made, err
}

func (c *Client) Relock(ctx context.Context, id torus.VolumeID, epoch uint64, lease torus.LeaseID, h *models.Holder) error {
	what := volumeName(id)
	if lease == 0 {
		return c.fail("Relock", what, fmt.Errorf("lease 0: %w", torus.ErrLeaseNotFound), "")
	}
	holder, err := proto.Marshal(metadata.HolderAt(h, epoch))
	if err != nil {
		return c.fail("Relock", what, fmt.Errorf("%v: %w", err, torus.ErrInvalid), "")
	}
	return c.write(ctx, "Relock", what, func(ctx context.Context, _ bool) error {
		s, state, lock, held, err := c.stateAndHolder(ctx, id)
		switch {
		case err != nil:
			return err
		case s.Epoch != epoch:
			return metadata.Fenced("Relock", what, epoch, s.Epoch)
		case held != nil && held.Epoch != epoch:
			return metadata.Locked("Relock", what, held)
		}
		resp, err := c.txn(ctx,
			[]clientv3.Cmp{unchanged(c.keys.state(id), state), unchanged(c.keys.lock(id), lock)},
			[]clientv3.Op{clientv3.OpPut(c.keys.lock(id), string(holder), clientv3.WithLease(clientv3.LeaseID(lease)))}, nil)
		if err == nil && !resp.Succeeded {
			err = errRaced
		}
		return err
	})
}

func (c *Client) Unlock(ctx context.Context, id torus.VolumeID, epoch uint64) error {
	key := c.keys.lock(id)
	return c.write(ctx, "Unlock", volumeName(id), func(ctx context.Context, _ bool) error {
		resp, err := c.get(ctx, key)
		if err != nil || len(resp.Kvs) == 0 {
			return err
		}
		var h models.Holder
		if err := decode(resp.Kvs[0], &h); err != nil || h.Epoch != epoch {
			return err
		}
		done, err := c.txn(ctx, []clientv3.Cmp{unchanged(key, resp.Kvs[0])}, []clientv3.Op{clientv3.OpDelete(key)}, nil)
		if err == nil && !done.Succeeded {
			err = errRaced
		}
		return err
	})
}

// WatchVolume returns ErrNotExist once there is no such volume.
func (c *Client) WatchVolume(ctx context.Context, id torus.VolumeID, fn func(torus.VolumeState)) error {
	var s *torus.VolumeState
	set := func(kv *mvccpb.KeyValue) error {
		now, err := decodeState(kv)
		s = &now
		return err
	}
	return c.watch(ctx, "WatchVolume", volumeName(id), c.keys.state(id), "", watcher{
		reset: func(kvs []*mvccpb.KeyValue) error {
			if len(kvs) == 0 {
				s = nil
				return nil
			}
			return set(kvs[0])
		},
		event: func(e *clientv3.Event) error {
			if e.Type == clientv3.EventTypePut {
				return set(e.Kv)
			}
			s = nil
			return nil
		},
		tell: func() error {
			if s == nil {
				return torus.ErrNotExist
			}
			fn(*s)
			return nil
		},
	})
}
