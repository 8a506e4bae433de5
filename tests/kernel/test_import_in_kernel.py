"""The policies that `kabpfctl import` prints, activated as they are."""

import pytest
from harness import UNTOUCHED, options_of_new

from kabpf.migration import proposals

COVERED = UNTOUCHED | {"keepalive": 1}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("LD_PRELOAD=libkeepalive.so", COVERED),
        ("LD_PRELOAD=libkeepalive.so KEEPIDLE=60 KEEPCNT=0", COVERED | {"idle": 60}),
        ("LD_PRELOAD=libkeepalive.so KEEPIDLE=60 KEEPALIVE=off", UNTOUCHED),
        (
            "LD_PRELOAD=libdontdie.so DD_TCP_KEEPALIVE_TIME=60 DD_TCP_KEEPALIVE_PROBES=6",
            COVERED | {"idle": 60, "probes": 6},
        ),
        (
            "LD_PRELOAD=libkeepalive_socket.so",
            COVERED | {"idle": 15, "interval": 15, "user_timeout": 150_000},
        ),
    ],
)
def test_unit_gets_what_its_library_gave(
    make_cgroup, write_policy, kabpfctl, peer, tmp_path, environment, expected
):
    """A unit whose environment preloads a library has the same options by the printed policy."""
    unit = tmp_path / "etc/systemd/system/preloaded-by.service"
    unit.parent.mkdir(parents=True)
    unit.write_text(f"[Service]\nEnvironment={environment}\n")
    (found,) = proposals.look(tmp_path, proc=None).policies
    file = write_policy(found.file.name, found.text)
    kabpfctl("check", file)
    kabpfctl("apply")
    assert options_of_new(peer, make_cgroup(unit.name)) == expected
