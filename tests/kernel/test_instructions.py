"""How many instructions the verifier walks through for each program: with a million it refuses, and
a few lines of C can double them."""

import ctypes
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from kabpf.kernel import dataplane, loading
from kabpf.kernel.libbpf import objects

pytestmark = pytest.mark.core

RECORD = Path(__file__).parents[1] / "matrix/instructions.yaml"
GROWTH = 1.2

STATISTICS = 4  # BPF_LOG_STATS in linux/bpf_verifier.h, since Linux 5.2
LOG_SIZE = 1 << 16


@pytest.fixture
def walked():
    """The number of instructions walked through, by program, as the verifier's log says: the
    kernel keeps it since Linux 5.16 alone."""
    libbpf = ctypes.CDLL("libbpf.so.1")
    libbpf.bpf_object__next_program.restype = libbpf.bpf_program__name.restype = ctypes.c_void_p
    logs = {}
    with objects.Object(str(dataplane.OBJECT)) as opened:
        loading.prepare(opened)
        handle, program = ctypes.c_void_p(opened.handle), None
        while program := libbpf.bpf_object__next_program(handle, ctypes.c_void_p(program)):
            at = ctypes.c_void_p(program)
            name = ctypes.string_at(libbpf.bpf_program__name(at)).decode()
            logs[name] = ctypes.create_string_buffer(LOG_SIZE)
            assert libbpf.bpf_program__set_log_level(at, STATISTICS) == 0
            assert libbpf.bpf_program__set_log_buf(at, logs[name], LOG_SIZE) == 0
        opened.load()
    return {
        name: int(re.search(rb"^processed (\d+) insns", log.value, re.MULTILINE)[1])
        for name, log in logs.items()
    }


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
