"""Cgroups by the cgroupsPath of a bundle."""

import pytest

from kabpf.engines import bundles


@pytest.mark.parametrize(
    ("path", "cgroup"),
    [
        ("machine.slice:libpod:0", "/machine.slice/libpod-0.scope"),
        ("a-b-c.slice:docker:0", "/a.slice/a-b.slice/a-b-c.slice/docker-0.scope"),
        (":docker:0", "/system.slice/docker-0.scope"),
        ("a.slice::0", "/a.slice/0.scope"),
        ("-.slice:docker:0", "/docker-0.scope"),
        ("/docker/0", "/docker/0"),
        ("/docker/0/", "/docker/0"),
        ("docker/0", ""),
        ("a.slice:docker", ""),
        ("a-" * 500_000 + "a.slice:docker:0", ""),
        ("", ""),
    ],
    ids=lambda text: text[:30],
)
def test_cgroup_is_where_the_runtime_makes_it(path, cgroup):
    """By systemd's driver, and by the cgroupfs driver."""
    assert bundles.cgroup(path) == cgroup
