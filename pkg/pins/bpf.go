// SPDX-License-Identifier: Apache-2.0

package pins

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of an update.
const (
	updateAny     = unix.BPF_ANY
	updateNoExist = unix.BPF_NOEXIST
)

// A pointer is 64 bits in the kernel's structures, on every machine. It is kept as one here, not as a number: what it points to may be on a
// stack, which moves.
const _ = uint(unsafe.Sizeof(uintptr(0)) - 8) // does not compile where pointers are shorter

// The members of union bpf_attr (linux/bpf.h) that are used here.
type (
	objAttr struct {
		path  unsafe.Pointer
		fd    uint32
		flags uint32
	}
	elemAttr struct {
		fd         uint32
		_          uint32
		key, value unsafe.Pointer
		flags      uint64
	}
	infoAttr struct {
		fd, size uint32
		info     unsafe.Pointer
	}
)

// mapInfo is the beginning of struct bpf_map_info.
type mapInfo struct {
	kind, id, keySize, valueSize, entries, flags uint32
}

// progInfo is the beginning of struct bpf_prog_info.
type progInfo struct {
	kind, id uint32
}

// call makes the system call, on so many bytes of attr. Nothing between the conversion of attr and the call
// makes a stack move.
func call(cmd int, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR, unix.EAGAIN:
		default:
			return -1, errno
		}
	}
}

// openPin returns a file descriptor, which is closed on exec, of what is pinned at path.
func openPin(path string) (int, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	attr := objAttr{path: unsafe.Pointer(name)}
	return call(unix.BPF_OBJ_GET, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

// readInfo fills in what the kernel knows of a map or program; size is how much of it fits. Whatever else is in info stays.
func readInfo(fd int, info unsafe.Pointer, size uintptr) error {
	attr := infoAttr{fd: uint32(fd), size: uint32(size), info: info}
	_, err := call(unix.BPF_OBJ_GET_INFO_BY_FD, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

func openProgram(path string) (int, error) {
	fd, err := openPin(path)
	if err != nil {
		return -1, fmt.Errorf("open program %s: %w", path, err)
	}
	return fd, nil
}

func programID(fd int) (uint32, error) {
	var info progInfo
	err := readInfo(fd, unsafe.Pointer(&info), unsafe.Sizeof(info))
	return info.id, err
}

// table is an open map with keys K and values V, which are the kernel's memory as it is; the zero table is a closed one.
type table[K, V any] struct {
	name string
	// handle is the file descriptor + 1.
	handle  int
	entries uint32
}

// open opens the pin, unless it is open already. The sizes must be those of K and V, or the kernel would write elsewhere.
func (t *table[K, V]) open(cfg Config, name string) error {
	if t.handle != 0 {
		return nil
	}
	path := MapPath(cfg, name)
	fd, err := openPin(path)
	if err != nil {
		return fmt.Errorf("open map %s: %s: %w", name, path, err)
	}
	var (
		info  mapInfo
		key   K
		value V
	)
	if err := readInfo(fd, unsafe.Pointer(&info), unsafe.Sizeof(info)); err != nil {
		return errors.Join(fmt.Errorf("look at map %s: %w", name, err), unix.Close(fd))
	}
	if uintptr(info.keySize) != unsafe.Sizeof(key) || uintptr(info.valueSize) != unsafe.Sizeof(value) {
		return errors.Join(fmt.Errorf("%s has another layout than this build of Margay: detach all pods and remove it", path), unix.Close(fd))
	}
	t.name, t.handle, t.entries = name, fd+1, info.entries
	return nil
}

func (t *table[K, V]) close() error {
	if t.handle == 0 {
		return nil
	}
	fd := t.handle - 1
	t.handle = 0
	return unix.Close(fd)
}

func (t *table[K, V]) elem(cmd int, key, value unsafe.Pointer, flags uint64) error {
	attr := elemAttr{fd: uint32(t.handle - 1), key: key, value: value, flags: flags}
	_, err := call(cmd, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	return err
}

// lookup returns the key's value, if there is one.
func (t *table[K, V]) lookup(key K) (value V, ok bool, err error) {
	err = t.elem(unix.BPF_MAP_LOOKUP_ELEM, unsafe.Pointer(&key), unsafe.Pointer(&value), 0)
	if errors.Is(err, unix.ENOENT) {
		return value, false, nil
	}
	return value, err == nil, err
}

// update sets the key's value. The error about one that is there, with updateNoExist, is unix.EEXIST.
func (t *table[K, V]) update(key K, value V, flags uint64) error {
	return t.elem(unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&key), unsafe.Pointer(&value), flags)
}

// fullError names the map and the knob when err says that there is no room.
func (t *table[K, V]) fullError(err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("map %s is full with %d entries; raise its size in the agent's configuration: %w", t.name, t.entries, err)
	}
	return err
}

// remove deletes the key; a missing one is no error.
func (t *table[K, V]) remove(key K) error {
	if err := t.elem(unix.BPF_MAP_DELETE_ELEM, unsafe.Pointer(&key), nil, 0); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
