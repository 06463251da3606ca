package devicetest

import (
	"fmt"

	"github.com/coreos/torus/device"
)

// Directory is a list of devices. It belongs to one loop.
type Directory struct {
	infos   []device.Info
	devices map[string]device.Device
	// Attached is how many times each device is open.
	Attached map[string]int
	// Opened is how many times any device was opened.
	Opened int
	// Fail, if not nil, may fail what is asked about a name; what is "list", "stat" or "open".
	Fail func(what, name string) error
	// Deliver, if not nil, is given each answer, to be called later. If nil that happens at once.
	Deliver func(answer func())
}

var _ device.Directory = (*Directory)(nil)

// NewDirectory returns an empty directory.
func NewDirectory() *Directory {
	return &Directory{devices: map[string]device.Device{}, Attached: map[string]int{}}
}

// Add adds a device.
func (d *Directory) Add(name, description string, dev device.Device) {
	d.infos = append(d.infos, device.Info{Name: name, Description: description, Size: dev.Size(), ReadOnly: dev.ReadOnly()})
	d.devices[name] = dev
}

func (d *Directory) answer(f func()) {
	if d.Deliver != nil {
		d.Deliver(f)
		return
	}
	f()
}

func (d *Directory) failure(what, name string) error {
	if d.Fail == nil {
		return nil
	}
	return d.Fail(what, name)
}

// List implements device.Directory.
func (d *Directory) List(done func([]device.Info, error)) {
	d.answer(func() {
		if err := d.failure("list", ""); err != nil {
			done(nil, err)
			return
		}
		done(d.infos, nil)
	})
}

// Stat implements device.Directory.
func (d *Directory) Stat(name string, done func(device.Info, error)) {
	d.answer(func() {
		if err := d.failure("stat", name); err != nil {
			done(device.Info{}, err)
			return
		}
		for _, i := range d.infos {
			if i.Name == name {
				done(i, nil)
				return
			}
		}
		done(device.Info{}, fmt.Errorf("volume %q: %w", name, device.ErrNotExist))
	})
}

// Open implements device.Directory.
func (d *Directory) Open(name string, done func(device.Device, error)) {
	d.answer(func() {
		if err := d.failure("open", name); err != nil {
			done(nil, err)
			return
		}
		dev, ok := d.devices[name]
		if !ok {
			done(nil, fmt.Errorf("volume %q: %w", name, device.ErrNotExist))
			return
		}
		d.Attached[name]++
		d.Opened++
		done(dev, nil)
	})
}

// Close implements device.Directory. It panics if the device is not open: that is a bug of the front end.
func (d *Directory) Close(name string, dev device.Device) {
	if d.devices[name] != dev || d.Attached[name] == 0 {
		panic(fmt.Sprintf("devicetest: Close of %q, which is not open", name))
	}
	d.Attached[name]--
}
