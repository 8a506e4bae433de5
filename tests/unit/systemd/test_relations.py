"""Which socket units pass their listeners to which services; tests/plans has what comes of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from plans import policies_of

from kabpf.systemd import relations
from kabpf.systemd.units import real_name


def sockets(directory: Path, selector: dict[str, str]) -> tuple[str, ...]:
    """What a selector brings, with the same files for both kinds of units."""
    policies = policies_of({"p": (selector, {"idle": 5})})
    where = {"unit": [directory], "user_unit": [directory]}
    ((found,),) = (policy.selectors for policy in relations.followed(policies, where))
    return found.sockets


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Sockets of front.service and app@.service that have other names."""
    (tmp_path / "front-tcp.socket").write_text("[Socket]\nService=front.service\n")
    (tmp_path / "app-tcp@.socket").write_text("[Socket]\nService=app@%i.service\n")
    (tmp_path / "web.service").write_text("[Service]\nSockets=web-a.socket 'web-b.socket'\n")
    return tmp_path


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"unit": "front.service"}, ("front-tcp.socket",)),
        ({"user_unit": "front.service"}, ("front-tcp.socket",)),
        ({"unit": "fr*.service"}, ("front-tcp.socket",)),
        ({"unit": "*.service"}, ("app-tcp@*.socket", "front-tcp.socket", "web-a.socket",
                                 "web-b.socket")),
        ({"unit": "app@x.service"}, ("app-tcp@x.socket",)),
        ({"unit": "app@.service"}, ("app-tcp@*.socket",)),
        ({"unit": "app@x*.service"}, ("app-tcp@x*.socket",)),
        ({"unit": "app.service"}, ()),
        ({"unit": "web.service"}, ("web-a.socket", "web-b.socket")),
        ({"unit": "front-tcp.socket"}, ()),
        ({"cgroup": "/front.service"}, ()),
    ],
)  # fmt: skip
def test_selector_brings_the_sockets_of_its_services(
    units: Path, selector: dict[str, str], expected: tuple[str, ...]
) -> None:
    """Names, globs and instances bring what is related to the services that they mean."""
    assert sockets(units, selector) == expected


@pytest.mark.parametrize(
    "text",
    [
        "[Socket]\nService=\nService=front.socket\n",
        "[Socket]\nService=%v.service\n",
        "Service=front.service\n",
        "[Socket]\nService=front.service\nService=back.service\n",
    ],
)
def test_what_names_no_service_is_no_relation(tmp_path: Path, text: str) -> None:
    """Only the last name of a service in the socket's section counts, as for systemd."""
    (tmp_path / "x.socket").write_text(text)
    assert sockets(tmp_path, {"unit": "front.service"}) == ()


def test_files_that_are_none_are_passed_over(units: Path) -> None:
    """A FIFO, a directory, bytes that are no text and a link that leads nowhere stop nobody."""
    os.mkfifo(units / "fifo.socket")
    (units / "directory.socket").mkdir()
    (units / "bytes.socket").write_bytes(b"\xff[Socket]\nService=front.service\n")
    (units / "link.socket").symlink_to("nowhere.socket")
    assert sockets(units, {"unit": "front.service"}) == ("front-tcp.socket",)


def test_fifo_with_a_writer_is_no_file(units: Path) -> None:
    """What is put into it is nothing that systemd would read, and nothing yet stops nobody."""
    os.mkfifo(units / "fifo.socket")
    writer = os.open(units / "fifo.socket", os.O_RDWR | os.O_NONBLOCK)
    try:
        assert sockets(units, {"unit": "front.service"}) == ("front-tcp.socket",)
        os.write(writer, b"[Socket]\nService=front.service\n")
        assert sockets(units, {"unit": "front.service"}) == ("front-tcp.socket",)
    finally:
        os.close(writer)


@pytest.mark.parametrize(
    ("socket", "expected"),
    [
        ("front-tcp.socket", ("front.service",)),
        ("app-tcp@x.socket", ("app@x.service",)),
        ("web-b.socket", ("web.service",)),
        ("web.socket", ("web.service",)),
        ("front.socket", ()),
    ],
)
def test_services_of_a_socket(units: Path, socket: str, expected: tuple[str, ...]) -> None:
    """Those of its name, where there is one, and those that the files relate to it."""
    assert relations.Services([units]).of(socket) == expected


def test_no_file_is_read_for_policies_without_services(tmp_path: Path) -> None:
    """Where nobody selects a service, it costs nothing."""
    policies = policies_of({"p": ({"cgroup": "/a"}, {"idle": 5})})
    os.mkfifo(tmp_path / "x.socket")
    assert relations.followed(policies, {"unit": [tmp_path]}) == policies


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ssh.service", "ssh.service"),
        ("sshd.service", "ssh.service"),
        ("old.service", ""),
        ("unknown.service", "unknown.service"),
        ("database@.service", "postgresql@.service"),
        ("database@15-main.service", "postgresql@15-main.service"),
        ("postgresql@15-main.service", "postgresql@15-main.service"),
    ],
)
def test_name_stands_for_a_unit(name: str, expected: str) -> None:
    """An alias of a template is one of its instances, too."""
    names = {
        "ssh.service": "ssh.service",
        "sshd.service": "ssh.service",
        "old.service": "",
        "database@.service": "postgresql@.service",
        "postgresql@.service": "postgresql@.service",
    }
    assert real_name(names, name) == expected
