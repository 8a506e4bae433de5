"""Ring buffers and perf events: what programs write, read in user space."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

from kabpf import proc
from kabpf.errors import RefusedError, UnsupportedError
from kabpf.kernel.libbpf.library import (
    POINTER,
    U32,
    RecordCallback,
    SampleCallback,
    checked,
    libbpf,
    pointer,
)

PERF_RECORD_SAMPLE = 9  # enum perf_event_type (linux/perf_event.h)


class RingBuffer:
    """The events of a pinned ring buffer. A context manager.

    `consume` calls `receive` with the bytes of each event that waits.
    """

    def __init__(self, path: str, receive: Callable[[bytes], None]) -> None:
        def sample(_context: int, data: int, size: int) -> int:
            receive(ctypes.string_at(data, size))
            return 0

        self._sample = SampleCallback(sample)
        descriptor = checked(f"open {path}", libbpf().bpf_obj_get(path.encode()))
        try:
            self._handle = pointer(
                f"read {path}",
                libbpf().ring_buffer__new(descriptor, self._sample, None, None),
            )
        finally:
            os.close(descriptor)

    def __enter__(self) -> RingBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; what waits, waits for the next reader."""
        libbpf().ring_buffer__free(self._handle)

    def fileno(self) -> int:
        """A descriptor that is readable while events wait."""
        return int(libbpf().ring_buffer__epoll_fd(self._handle))

    def descriptors(self) -> list[int]:
        """The descriptor alone in a list: PerfBuffers has several."""
        return [self.fileno()]

    def consume(self) -> None:
        """Receive every event that waits, without waiting for one."""
        checked("read events", libbpf().ring_buffer__consume(self._handle))


class PerfBuffers:
    """Perf events in the pinned map at `path`, one for each processor that works, from the key
    `first` on, with so many pages each; they go when this process does. A context manager.

    `consume` calls `receive` with the bytes of each event that waits.
    """

    def __init__(self, path: str, first: int, pages: int, receive: Callable[[bytes], None]) -> None:
        def record(_context: int, _cpu: int, address: int) -> int:
            header = _RecordHeader.from_address(address)
            if header.type == PERF_RECORD_SAMPLE:
                receive(ctypes.string_at(address + ctypes.sizeof(header), header.raw_size))
            return GO_ON

        self._record = RecordCallback(record)
        attributes, options = _PerfAttributes.of_bpf(), _RawOptions(first)
        # Its end takes the events out of the map (perf_event_fd_array_release() in
        # kernel/bpf/arraymap.c), also when the process is killed.
        self._map = checked(f"open {path}", libbpf().bpf_obj_get(path.encode()))
        try:
            self._handle = pointer(
                f"read {path}",
                libbpf().perf_buffer__new_raw(
                    self._map,
                    pages,
                    ctypes.byref(attributes),
                    self._record,
                    None,
                    ctypes.byref(options),
                ),
            )
        except RefusedError as error:
            os.close(self._map)
            if error.error in (errno.EACCES, errno.EPERM):
                raise UnsupportedError(
                    "the kernel refuses perf_event_open(2): it needs CAP_SYS_ADMIN, and in a"
                    " container a system call filter that allows it"
                ) from None
            raise

    def __enter__(self) -> PerfBuffers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the events out of the map."""
        libbpf().perf_buffer__free(self._handle)
        os.close(self._map)

    def descriptors(self) -> list[int]:
        """One for each processor, which is readable once after events came. They must not be nested
        in another epoll: the first poll consumes the readiness (perf_poll() in
        kernel/events/core.c)."""
        library = libbpf()
        count = library.perf_buffer__buffer_cnt(self._handle)
        return [int(library.perf_buffer__buffer_fd(self._handle, each)) for each in range(count)]

    def consume(self) -> None:
        """Receive every event that waits, without waiting for one."""
        checked("read events", libbpf().perf_buffer__consume(self._handle))


GO_ON = -2  # LIBBPF_PERF_EVENT_CONT


class _RecordHeader(ctypes.Structure):
    """struct perf_event_header (linux/perf_event.h), and the size of a sample."""

    _fields_ = (
        ("type", U32),
        ("misc", ctypes.c_uint16),
        ("size", ctypes.c_uint16),
        ("raw_size", U32),
    )


class _PerfAttributes(ctypes.Structure):
    """The beginning of struct perf_event_attr (linux/perf_event.h)."""

    _fields_ = (
        ("type", U32),
        ("size", U32),
        ("config", ctypes.c_uint64),
        ("sample_period", ctypes.c_uint64),
        ("sample_type", ctypes.c_uint64),
        ("read_format", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("wakeup_events", U32),
        ("bp_type", U32),
        ("config1", ctypes.c_uint64),
    )

    @classmethod
    def of_bpf(cls) -> _PerfAttributes:
        """Of what bpf_perf_event_output() writes; each event wakes the reader."""
        software, bpf_output, sample_raw = 1, 10, 1 << 10
        size = ctypes.sizeof(cls)  # PERF_ATTR_SIZE_VER0
        return cls(software, size, bpf_output, 1, sample_raw, 0, 0, 1)


class _RawOptions(ctypes.Structure):
    """struct perf_buffer_raw_opts (bpf/libbpf.h)."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("count", ctypes.c_int),
        ("cpus", POINTER),
        ("keys", POINTER),
    )

    def __init__(self, first: int) -> None:
        cpus = [cpu for cpu in range(processors()) if _is_online(cpu)]
        room = ctypes.c_int * len(cpus)
        self._arrays = room(*cpus), room(*(first + cpu for cpu in cpus))
        pointers = (ctypes.addressof(array) for array in self._arrays)
        super().__init__(ctypes.sizeof(type(self)), len(cpus), *pointers)


def processors() -> int:
    """How many processors the kernel may ever have."""
    return checked("count processors", libbpf().libbpf_num_possible_cpus())


def _is_online(cpu: int) -> bool:
    """One that can't be taken off has no such file."""
    try:
        return proc.read(f"/sys/devices/system/cpu/cpu{cpu}/online") == b"1\n"
    except FileNotFoundError:
        return os.path.isdir(f"/sys/devices/system/cpu/cpu{cpu}")
