"""What kabpfctl doctor says of container engines."""

from __future__ import annotations

import os
from pathlib import Path

from kabpf.doctor import containers
from kabpf.doctor.containers import Helper
from kabpf.doctor.findings import Finding, Grade
from kabpf.engines.engines import Found
from kabpf.plan.state import Cgroup

PODMAN, DOCKER = Found("podman"), Found("docker")
HELPER = Helper(7, "pasta.avx2", "/user.slice/user-7.slice")


def check(
    *engines: Found,
    selects: bool = True,
    helpers: tuple[Helper, ...] = (),
    uncovered: tuple[str, ...] = (),
    hooks: tuple[Path, ...] = (Path("/dev/null"),),
) -> list[Finding]:
    return list(
        containers.check(
            engines,
            selects_containers=selects,
            helpers=helpers,
            uncovered=[Cgroup(number, 0, path) for number, path in enumerate(uncovered)],
            hooks=hooks,
        )
    )


def test_engines_are_named() -> None:
    """Those that are here, or that there is none."""
    assert check(PODMAN, DOCKER) == [Finding(Grade.OK, "engines: podman, docker")]
    assert check() == [Finding(Grade.OK, "no container engine is here")]


def test_engine_that_can_not_be_read_is_said_where_a_policy_needs_it() -> None:
    """With the reason."""
    lacking = Found("podman", "/var/lib/containers/storage/db.sql: Permission denied")
    first, _ = check(lacking)
    assert first.grade == Grade.WARNING
    assert first.text == f"containers of podman are not known: {lacking.lacks}"
    assert len(check(lacking, selects=False)) == 1


def test_wish_that_does_not_count_is_said_once_for_all() -> None:
    """A stranger may start any number of containers that ask for nonsense."""
    found = list(
        containers.check(
            [PODMAN],
            selects_containers=True,
            helpers=(),
            uncovered=(),
            refusals=["container a: why", "container b: why", "container c: why"],
            hooks=(Path("/dev/null"),),
        )
    )
    assert [each.grade for each in found] == [Grade.NOTE, Grade.OK]
    assert found[0].text == "container a: why, and 2 others"


def test_hook_that_is_missing_is_said_for_engines_that_have_hooks() -> None:
    """Not of Docker, nor where no policy selects containers."""
    nowhere = (Path("/nowhere"),)
    first, _ = check(PODMAN, DOCKER, hooks=nowhere)
    assert first.grade == Grade.WARNING
    assert first.text.startswith("no hook of kabpf's for podman: ")
    assert len(check(DOCKER, hooks=nowhere)) == 1
    assert len(check(PODMAN, hooks=nowhere, selects=False)) == 1


def test_helper_that_no_policy_covers_is_said() -> None:
    """It connects in a container's place, and a policy for the container does not reach it."""
    first, _ = check(PODMAN, helpers=(HELPER,), uncovered=("/", HELPER.cgroup))
    assert first == Finding(
        Grade.NOTE,
        "pasta.avx2 (process 7) connects for containers, and no policy covers its cgroup"
        " /user.slice/user-7.slice",
        "kabpfctl explain 7",
    )
    assert len(check(PODMAN, helpers=(HELPER,), uncovered=("/",))) == 1


def test_container_of_a_user_that_no_policy_covers_is_said() -> None:
    """Where a policy selects containers, as that does not name it; with what does."""
    manager = "/user.slice/user-7.slice/user@7.service"
    scope = f"{manager}/user.slice/libpod-{'a' * 64}.scope"
    first, _ = check(PODMAN, uncovered=("/", scope))
    assert first == Finding(
        Grade.NOTE,
        f"{scope} is a container of user 7, whose engine's store is in the user's home, which"
        " kabpf does not read: container: and pod: selectors do not name it",
        f"select cgroup: {manager}/user.slice/libpod-*.scope",
    )
    assert len(check(PODMAN, uncovered=(scope,), selects=False)) == 1
    assert len(check(PODMAN, uncovered=("/",))) == 1


def test_helpers_are_known_by_their_names(tmp_path: Path) -> None:
    """As the kernel has them; a process that ends meanwhile is none."""
    own = str(os.getpid())
    for name, command in ((own, "docker-proxy"), ("1", "systemd"), ("x", "pasta")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comm").write_text(f"{command}\n")
    (tmp_path / "8").mkdir()
    found = list(containers.helpers(str(tmp_path)))
    assert [(each.process, each.name) for each in found] == [(int(own), "docker-proxy")]
