"""BPF object files."""

from __future__ import annotations

import ctypes

from kabpf.errors import BpfError
from kabpf.faults import fault_point
from kabpf.kernel.libbpf.library import checked, libbpf, logged, pointer
from kabpf.kernel.libbpf.maps import MapDefinition


class Object:
    """An opened BPF object file with its maps and programs; libbpf knows it by `handle`. A context
    manager."""

    def __init__(self, path: str) -> None:
        self.handle = pointer(f"open {path}", libbpf().bpf_object__open_file(path.encode(), None))

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        libbpf().bpf_object__close(self.handle)

    def set_constants(self, values: bytes) -> None:
        """Give the object's read-only data, all of them, their values; before `load`."""
        size = ctypes.c_size_t()
        memory = libbpf().bpf_map__initial_value(self._map(".rodata"), ctypes.byref(size))
        assert size.value == len(values)
        ctypes.memmove(memory, values, len(values))

    def set_room(self, name: str, entries: int) -> None:
        """Give a map so many entries; before `load`."""
        step = f"make room in {name}"
        checked(step, libbpf().bpf_map__set_max_entries(self._map(name), entries))

    def load(self) -> None:
        """Create the maps and have the kernel verify the programs.

        The error carries libbpf's own words, the verifier's log included, as its cause.
        """
        with logged() as lines:
            error = libbpf().bpf_object__load(self.handle)
        if error:
            raise BpfError("load the BPF programs", -error) from RuntimeError("".join(lines))

    def definition(self, name: str) -> MapDefinition:
        """What a map of the object is like; before `load` or after it."""
        library, map = libbpf(), self._map(name)
        return MapDefinition(
            library.bpf_map__type(map),
            library.bpf_map__key_size(map),
            library.bpf_map__value_size(map),
            library.bpf_map__max_entries(map),
            library.bpf_map__map_flags(map),
        )

    def pin_map(self, name: str, path: str) -> None:
        """Pin a map at `path`; after `load`."""
        fault_point(f"pin {name}")
        checked(f"pin {path}", libbpf().bpf_map__pin(self._map(name), path.encode()))

    def pin_program(self, name: str, path: str) -> None:
        """Pin a program at `path`; after `load`."""
        fault_point(f"pin {name}")
        checked(f"pin {path}", libbpf().bpf_program__pin(self._program(name), path.encode()))

    def attach(self, name: str, path: str) -> None:
        """Attach a program where its section says, and pin its link at `path`."""
        library = libbpf()
        fault_point(f"attach {name}")
        link = pointer(f"attach {name}", library.bpf_program__attach(self._program(name)))
        try:
            fault_point(f"pin {name}")
            checked(f"pin {path}", library.bpf_link__pin(link, path.encode()))
        finally:
            library.bpf_link__destroy(link)  # closes the descriptor; the pin keeps the link

    def descriptor(self, name: str) -> int:
        """A program's descriptor, open as long as the object is."""
        return int(libbpf().bpf_program__fd(self._program(name)))

    def _map(self, name: str) -> int:
        return pointer(
            f"find map {name}",
            libbpf().bpf_object__find_map_by_name(self.handle, name.encode()),
        )

    def _program(self, name: str) -> int:
        return pointer(
            f"find program {name}",
            libbpf().bpf_object__find_program_by_name(self.handle, name.encode()),
        )
