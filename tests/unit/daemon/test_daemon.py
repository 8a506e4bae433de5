"""What the daemon does first; tests/kernel/test_daemon.py has it at work."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kabpf.apply.transient import Ending
from kabpf.daemon.daemon import Daemon
from kabpf.daemon.timers import Timer, Timers
from kabpf.policy.model import Until


@pytest.mark.parametrize("timer", [Timer.BEAT, Timer.REST, Timer.LOOK])
def test_cgroups_that_come_and_go_without_a_rest_keep_nothing_waiting(
    timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users who have some see to it that there is always news of them."""
    daemon: Any = object.__new__(Daemon)
    done: list[Timer] = []
    for name, what in (
        ("_beat", Timer.BEAT),
        ("_take_back", Timer.REST),
        ("_reload_if_changed", Timer.LOOK),
    ):
        monkeypatch.setattr(Daemon, name, lambda _, what=what: done.append(what))
    news = [Ending(Until("/user.slice/x", 7), 1000)]
    daemon._signals = SimpleNamespace(arrived=set())
    daemon._active = SimpleNamespace(
        ends=SimpleNamespace(news=lambda: news), is_any_over=lambda endings=None: endings is None
    )
    daemon._timers = Timers()
    daemon._timers.start(timer, 0)
    daemon._do_next()
    daemon._do_next()
    assert done == [timer]
