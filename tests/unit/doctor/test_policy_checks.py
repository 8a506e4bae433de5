"""What kabpfctl doctor says of policy files that are right: a directory of files in, findings
out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kabpf.doctor import policy_checks
from kabpf.doctor.findings import Finding, note, warning
from kabpf.kernel.mountinfo import Mount
from kabpf.plan.state import Cgroup
from kabpf.policy import files
from kabpf.policy.files import Directories
from kabpf.policy.model import Policy
from kabpf.policy.parser import combine

OPTIONS = "keepalive: {idle: 60, user_timeout: off}"


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    """etc/policy.yaml, etc/policy.d and lib/policy.d, which are empty."""
    where = Directories(
        tmp_path / "etc/policy.yaml", (tmp_path / "etc/policy.d", tmp_path / "lib/policy.d")
    )
    for each in where.drop_ins:
        each.mkdir(parents=True)
    return where


def put(directory: Path, name: str, text: str = OPTIONS) -> Path:
    (directory / name).write_text(text)
    return directory / name


def test_file_in_a_stronger_directory_is_told(directories: Directories) -> None:
    """A file that takes another's place is named with it, and so is one that masks it."""
    strong, weak = directories.drop_ins
    put(weak, "alone.service.yaml")
    for name in ("a.service.yaml", "b.service.yaml", "c.service.yaml"):
        put(weak, name)
    put(strong, "a.service.yaml")
    put(strong, "b.service.yaml", "")
    (strong / "c.service.yaml").symlink_to("/dev/null")
    assert list(policy_checks.replaced(directories)) == [
        note(f"{strong}/a.service.yaml takes the place of {weak}/a.service.yaml",
             f"nothing if that is meant; else: diff {weak}/a.service.yaml"
             f" {strong}/a.service.yaml"),
        note(f"{strong}/b.service.yaml masks {weak}/b.service.yaml",
             f"nothing if that is meant; else: diff {weak}/b.service.yaml"
             f" {strong}/b.service.yaml"),
        note(f"{strong}/c.service.yaml masks {weak}/c.service.yaml",
             f"nothing if that is meant; else: diff {weak}/c.service.yaml"
             f" {strong}/c.service.yaml"),
    ]  # fmt: skip


NO_POLICY = "rename it to end in .yaml if it is a policy file; else nothing"


def test_file_that_nobody_reads_is_told(directories: Directories) -> None:
    """Files beside the main one, and those whose names have another ending or a dot before them."""
    strong, _ = directories.drop_ins
    put(directories.main.parent, "policy.yaml", "policies: {}")
    put(directories.main.parent, "nginx.yaml")
    for name in (".hidden.yaml", "nginx.service.yaml", "nginx.service.yaml~", "nginx.yml"):
        put(strong, name)
    beside, other = directories.main.parent / "nginx.yaml", strong / "nginx.yml"
    assert list(policy_checks.ignored(directories)) == [
        warning(f"{beside} is not read", f"mv -n {beside} {strong}/"),
        note(f"{strong}/.hidden.yaml is not read, because of its name",
             NO_POLICY),
        note(f"{strong}/nginx.service.yaml~ is not read, because of its name",
             NO_POLICY),
        warning(f"{other} is not read", f"mv -n {other} {strong}/nginx.yaml"),
    ]  # fmt: skip


def test_config_map_is_nothing_odd(directories: Directories) -> None:
    """Kubernetes mounts the files of a ConfigMap as links behind a directory whose name begins with
    two dots."""
    strong, _ = directories.drop_ins
    (strong / "..2026_11_22").mkdir()
    put(strong / "..2026_11_22", "nginx.service.yaml")
    (strong / "..data").symlink_to("..2026_11_22")
    (strong / "nginx.service.yaml").symlink_to("..data/nginx.service.yaml")
    assert list(policy_checks.ignored(directories)) == []
    assert list(policy_checks.replaced(directories)) == []


def test_missing_directories_are_nothing_odd(tmp_path: Path) -> None:
    """Where nothing was installed there is nothing to say."""
    where = Directories(tmp_path / "none/policy.yaml", (tmp_path / "none/policy.d",))
    assert [*policy_checks.ignored(where), *policy_checks.replaced(where)] == []


def test_policy_whose_name_is_used_again_is_told(directories: Directories) -> None:
    """Of two policies of one name the one that does not count is named, with the other."""
    strong, weak = directories.drop_ins
    policy = f"policies: {{web: {{select: [{{cgroup: /a}}], {OPTIONS}}}}}"
    first, second = put(weak, "a.yaml", policy), put(strong, "b.yaml", policy)
    read = {path: files.read(path) for path in files.paths(directories)}
    assert list(policy_checks.namesakes(read)) == [
        note(
            f"policy web of {first}:1 is replaced by {second}:1",
            "give one another name: kabpfctl edit a.yaml",
        )
    ]


UNIT_FILES = {
    "nginx.service": "nginx.service",
    "postgresql@.service": "postgresql@.service",
    "redis-server.service": "redis-server.service",
    "mariadb.service": "mariadb.service",
    "mysql.service": "mariadb.service",
    "old.service": "",
}
CGROUPS = (
    *("/", "/system.slice", "/system.slice/cron.service", "/system.slice/_cgroup.x.service"),
    *("/app", "/app/worker"),
)


@pytest.fixture
def policies(tmp_path: Path) -> Callable[[str], tuple[Policy, ...]]:
    """Policies with these selectors, each in a line of a file p.yaml."""

    def make(*selectors: str) -> tuple[Policy, ...]:
        lines = [f"  p{n}: {{select: [{each}], {OPTIONS}}}" for n, each in enumerate(selectors)]
        return combine([files.read(put(tmp_path, "p.yaml", "\n".join(["policies:", *lines])))])

    return make


def selected(policies: tuple[Policy, ...], **winners: str) -> list[Finding]:
    """The findings on CGROUPS, of which some have a policy (path, without slashes)."""
    cgroups: dict[Cgroup, str | None] = {
        Cgroup(id, 0, path): winners.get(path.replace("/", "_")) for id, path in enumerate(CGROUPS)
    }
    found = list(
        policy_checks.selectors(policies, cgroups, {"unit": UNIT_FILES, "user_unit": UNIT_FILES})
    )
    place = f"{policies[0].source.path}:"
    return [Finding(each.grade, each.text.replace(place, ""), each.advice) for each in found]


NOT_RUNNING = "nothing if they are stopped; to see what is covered: kabpfctl plan"


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("{unit: cron.service}", []),
        ("{cgroup: /app}", []),
        ("{cgroup: /app/*}", []),
        ("{cgroup: /}", []),
        (
            "{unit: nginx.service}",
            [note("without a cgroup now: nginx.service", NOT_RUNNING)],
        ),
        (
            "{unit: postgresql@.service}",
            [note("without a cgroup now: postgresql@*.service", NOT_RUNNING)],
        ),
        (
            "{unit: postgresql@15-main.service}",
            [note("without a cgroup now: postgresql@15-main.service", NOT_RUNNING)],
        ),
        (
            "{unit: session-3.scope}",
            [note("without a cgroup now: session-3.scope", NOT_RUNNING)],
        ),
        (
            "{cgroup: /kubepods.slice/**}",
            [note("without a cgroup now: /kubepods.slice/**", NOT_RUNNING)],
        ),
        (
            "{cgroup: /other/path}",
            [note("without a cgroup now: /other/path", NOT_RUNNING)],
        ),
        (
            "{unit: ngnix.service}",
            [
                warning(
                    "2: unit ngnix.service of policy p0: no such unit, running or installed",
                    "if you mean nginx.service: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{unit: crond.service}",
            [
                warning(
                    "2: unit crond.service of policy p0: no such unit, running or installed",
                    "if you mean cron.service: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{unit: _cgroup.x.service}",
            [
                warning(
                    "2: unit _cgroup.x.service of policy p0: no such unit, running or installed",
                    "if you mean cgroup.x.service: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{unit: redis.service}",
            [
                warning(
                    "2: unit redis.service of policy p0: no such unit, running or installed",
                    "if you mean redis-server.service: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{unit: quite-other.service}",
            [
                warning(
                    "2: unit quite-other.service of policy p0: no such unit, running or installed",
                    "correct the name: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{user_unit: quite-other.service}",
            [
                note(
                    "2: user_unit quite-other.service of policy p0: no such unit,"
                    " running or installed",
                    "correct the name: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{unit: mysql.service}",
            [
                warning(
                    "2: unit mysql.service of policy p0 is an alias, and the cgroup is"
                    " mariadb.service",
                    "select mariadb.service: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{unit: old.service}",
            [note("2: unit old.service of policy p0 is masked", "systemctl unmask old.service")],
        ),
        (
            "{cgroup: /sys/fs/cgroup/app/worker}",
            [
                warning(
                    "2: cgroup /sys/fs/cgroup/app/worker of policy p0: drop the"
                    " /sys/fs/cgroup prefix",
                    "select /app/worker: kabpfctl edit p.yaml",
                )
            ],
        ),
        (
            "{cgroup: /app/workers}",
            [
                warning(
                    "2: cgroup /app/workers of policy p0: no such cgroup",
                    "if you mean worker: kabpfctl edit p.yaml",
                )
            ],
        ),
    ],
)
def test_selector_that_names_nothing(
    policies: Callable[[str], tuple[Policy, ...]], selector: str, expected: list[Finding]
) -> None:
    """A selector without a cgroup is either of what does not run now, or a slip."""
    # It is not beaten in the cgroups that it names.
    names = ("_", "_app", "_app_worker", "_system.slice_cron.service")
    assert selected(policies(selector), **dict.fromkeys(names, "p0")) == expected


def test_selector_of_a_cgroup_of_version_1_is_told(
    policies: Callable[[str], tuple[Policy, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a hybrid machine: it is there, but not in the tree that policies are of."""
    (tmp_path / "old/docker/abc").mkdir(parents=True)
    (tmp_path / "old/docker/abc/cgroup.procs").write_text("")
    mounts = [Mount(0, "/", str(tmp_path / "old"), "cgroup")]
    monkeypatch.setattr(policy_checks.mountinfo, "visible_mounts", lambda: mounts)
    assert selected(policies("{cgroup: /docker/abc}")) == [
        warning(
            "2: cgroup /docker/abc of policy p0: /docker/abc is a cgroup of version 1"
            f" ({tmp_path}/old/docker/abc); it has no process",
            "select those cgroups: kabpfctl edit p.yaml",
        )
    ]


def test_many_units_that_do_not_run_are_one_finding(
    policies: Callable[..., tuple[Policy, ...]],
) -> None:
    """Of many the first are named."""
    found = selected(policies(*(f"{{unit: postgresql@{n}.service}}" for n in range(9))))
    names = ", ".join(f"postgresql@{n}.service" for n in range(5))
    assert found == [note(f"without a cgroup now: {names} and 4 more", NOT_RUNNING)]


def test_policy_that_is_beaten_everywhere_is_told(
    policies: Callable[..., tuple[Policy, ...]],
) -> None:
    """A policy that has no cgroup of those that it names, because others have them all."""
    made = policies("{cgroup: /app/*}", "{cgroup: /app/worker}", "{cgroup: /app/**}")
    assert selected(made, _app_worker="p1") == [
        note(
            f"policy {name} is beaten in every cgroup that it names, by p1",
            "nothing if that is meant; why: kabpfctl explain /app/worker",
        )
        for name in ("p0", "p2")
    ]


def test_policy_that_leaves_its_times_to_the_system_is_told(tmp_path: Path) -> None:
    """Without idle the first probe comes after most middleboxes have forgotten the connection;
    without user timeout unacknowledged data waits long. A policy that is off needs neither."""
    text = (
        "policies:\n"
        "  on: {select: [{cgroup: /a}], keepalive: on}\n"
        "  off: {select: [{cgroup: /b}], keepalive: off}\n"
        "  all: {select: [{cgroup: /c}], keepalive: {idle: 60, user_timeout: off}}\n"
    )
    file = put(tmp_path, "p.yaml", text)
    made = combine([files.read(file)])
    idle, timeout = policy_checks.fallbacks(made, 7200, 925)
    assert (idle.grade, idle.advice) == (
        "warning",
        "give idle or a preset (kabpfctl presets): kabpfctl edit p.yaml",
    )
    assert idle.text.startswith(
        "no idle in on: the first probe comes after 7200 s (net.ipv4.tcp_keepalive_time), too late"
    )
    assert timeout == note(
        "no user timeout in on: while data is unacknowledged no probe is sent, and the connection"
        " ends after about 925 s (net.ipv4.tcp_retries2); a user timeout ends it sooner, and those"
        " of readers that pause",
        "nothing, or give one; its price: man kabpf.yaml",
    )
    assert list(policy_checks.fallbacks(made, None, None)) == []
