"""How many instructions the verifier walks through for each program: with a million it refuses, and
a few lines of C can double them."""

import ctypes
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.core

RECORD = Path(__file__).parents[1] / "matrix/instructions.yaml"
GROWTH = 1.2

# linux/bpf.h: the size of struct bpf_prog_info, and where verified_insns is in it. Since Linux
# kernel commit aba64c7da983 ("bpf: Add verified_insns to bpf_prog_info and fdinfo") (in v5.16).
INFO_SIZE, VERIFIED_INSNS = 232, 216


@pytest.fixture
def walked(kabpfctl, own_objects):
    """The number of instructions walked through, by program."""
    kabpfctl("apply")
    libbpf = ctypes.CDLL("libbpf.so.1")
    numbers = {}
    for id, name in own_objects()["prog"].items():
        descriptor = libbpf.bpf_prog_get_fd_by_id(id)
        info, size = ctypes.create_string_buffer(INFO_SIZE), ctypes.c_uint32(INFO_SIZE)
        assert libbpf.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size)) == 0
        os.close(descriptor)
        (numbers[name],) = struct.unpack_from("I", info, VERIFIED_INSNS)
    return numbers


@pytest.fixture
def setting():
    """What the numbers hang on: the kernel's series and the compiler's."""
    kernel = re.match(r"\d+\.\d+", os.uname().release)
    clang = subprocess.check_output(["clang", "-dumpversion"], text=True).partition(".")
    return f"Linux {kernel[0]}, clang {clang[0]}"


def test_no_program_has_grown(walked, setting):
    """No program takes a fifth more than the record says for this kernel and compiler.

    KABPF_RECORD is where to write a record that has them as they are now."""
    record = yaml.safe_load(RECORD.read_text())
    if target := os.environ.get("KABPF_RECORD"):
        record[setting] = walked
        Path(target).write_text(yaml.safe_dump(record))
    if setting not in record:
        pytest.skip(f"{RECORD.name} has no {setting}; KABPF_RECORD adds it: {walked}")
    before = {name: record[setting].get(name, 0) for name in walked}
    grown = [
        f"{name}: {before[name]} instructions on record, {number} now"
        for name, number in walked.items()
        if number > before[name] * GROWTH
    ]
    assert not grown
