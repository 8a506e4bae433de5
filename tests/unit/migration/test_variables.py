"""The environment of libkeepalive, libdontdie and msantos/libkeepalive, as options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as any_

from kabpf.errors import PolicyError
from kabpf.migration.variables import VARIABLES, Asked, read
from kabpf.policy import options

NAMES = [name for names in VARIABLES.values() for name in names]
SECONDS = [*VARIABLES["idle"], *VARIABLES["interval"]]


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ("", Asked()),
        (
            "KEEPIDLE=30 KEEPINTVL=5 KEEPCNT=4",
            Asked(options={"idle": "30", "interval": "5", "probes": "4"}),
        ),
        (
            "DD_TCP_KEEPALIVE_TIME=4 DD_TCP_KEEPALIVE_INTVL=5 DD_TCP_KEEPALIVE_PROBES=6 DD_DEBUG=1",
            Asked(options={"idle": "4", "interval": "5", "probes": "6"}, debug=True),
        ),
        (
            "TCP_KEEPIDLE=9 TCP_KEEPINTVL=8 TCP_KEEPCNT=7 TCP_USER_TIMEOUT=65500",
            Asked(options={"idle": "9", "interval": "8", "probes": "7", "user_timeout": "65500ms"}),
        ),
        ("KEEPIDLE=030", Asked(options={"idle": "30"})),
        ("KEEPALIVE=on", Asked()),
        ("KEEPALIVE=off", Asked(keepalive=False)),
        ("KEEPALIVE=OFF KEEPIDLE=30", Asked(keepalive=False)),
        ("DD_USE_KEEPALIVE=0", Asked(keepalive=False)),
        ("DD_USE_KEEPALIVE=1 DD_DEBUG=0", Asked()),
        ("DD_EVAL_ENVIRONMENT_ONCE=1", Asked()),
        ("KEEPIDLE=30 DD_TCP_KEEPALIVE_INTVL=5", Asked(options={"idle": "30", "interval": "5"})),
        ("KEEPIDLE=30 TCP_KEEPIDLE=30", Asked(options={"idle": "30"})),
        (
            "TCP_KEEPIDLE=9 TCP_KEEPINTVL=8 TCP_KEEPCNT=7 TCP_USER_TIMEOUT=-1",
            Asked(options={"idle": "9", "interval": "8", "probes": "7", "user_timeout": "auto"}),
        ),
        ("PATH=/bin TCP_SYNCNT=3", Asked(options={"syn_retries": "3"})),
        ("KEEPALIVE= KEEPIDLE= KEEPCNT=4 DD_DEBUG= TCP_KEEPCNT=", Asked(options={"probes": "4"})),
        ("TCP_KEEPIDLE=0 TCP_KEEPINTVL=0 TCP_KEEPCNT=00 TCP_SYNCNT=0", Asked()),
        ("TCP_KEEPIDLE=9 TCP_USER_TIMEOUT=0", Asked(options={"idle": "9", "user_timeout": "off"})),
        ("TCP_KEEPIDLE=0 KEEPIDLE=", Asked()),
        (
            "KEEPALIVE=65 KEEPIDLE=9",
            Asked(options={"idle": "9"}, warnings=("KEEPALIVE: 65 is neither off nor on",)),
        ),
        (
            "KEEPALIVE=65 DD_USE_KEEPALIVE=0",
            Asked(keepalive=False, warnings=("KEEPALIVE: 65 is neither off nor on",)),
        ),
    ],
)
def test_variables_are_options(variables: str, asked: Asked) -> None:
    """Each family's variables give its options; what is unset is not among them."""
    assert read(_parsed(variables)) == asked


@pytest.mark.parametrize("name", SECONDS)
@pytest.mark.parametrize("text", ["1", "32767"])
def test_limits_of_seconds_are_the_kernels(name: str, text: str) -> None:
    """Times may be as short and as long as the kernel takes them."""
    (value,) = read({name: text}).options.values()
    assert value == text


@pytest.mark.parametrize(
    ("variables", "finding"),
    [
        ("KEEPIDLE=0", "KEEPIDLE: 0 is not in 1 to 32767 seconds"),
        ("KEEPINTVL=32768", "KEEPINTVL: 32768 is not in 1 to 32767 seconds"),
        ("KEEPCNT=128", "KEEPCNT: 128 is not in 1 to 127"),
        ("KEEPIDLE=60s", "KEEPIDLE: 60s, expected a number, 1 to 32767 seconds"),
        (
            "DD_TCP_KEEPALIVE_TIME=-1",
            "DD_TCP_KEEPALIVE_TIME: -1, expected a number, 1 to 32767 seconds",
        ),
        (
            "DD_TCP_KEEPALIVE_PROBES=six",
            "DD_TCP_KEEPALIVE_PROBES: six, expected a number, 1 to 127",
        ),
        (
            "TCP_USER_TIMEOUT=2147483648",
            "TCP_USER_TIMEOUT: 2147483648 is not in 1 to 2147483647 ms",
        ),
        (
            "TCP_USER_TIMEOUT=-1 TCP_KEEPIDLE=9",
            "TCP_USER_TIMEOUT: -1 without interval, probes,"
            " expected all of idle, interval and probes",
        ),
        ("TCP_SYNCNT=128", "TCP_SYNCNT: 128 is not in 1 to 127"),
        (
            "TCP_KEEPIDLE=0 KEEPIDLE=9",
            "KEEPIDLE=9 and TCP_KEEPIDLE=0 contradict each other, expected one of them",
        ),
        ("DD_USE_KEEPALIVE=off", "DD_USE_KEEPALIVE: off, expected 0 or 1"),
        ("DD_DEBUG=yes", "DD_DEBUG: yes, expected 0 or 1"),
        (
            "DD_EVAL_ENVIRONMENT_ONCE=0",
            "DD_EVAL_ENVIRONMENT_ONCE: 0 works only inside the process, expected 1, and a policy"
            " with destinations where the sockets of one process are to differ",
        ),
        (
            "KEEPIDLE=30 DD_TCP_KEEPALIVE_TIME=60",
            "KEEPIDLE=30 and DD_TCP_KEEPALIVE_TIME=60 contradict each other, expected one of them",
        ),
        (
            "KEEPALIVE=off DD_USE_KEEPALIVE=1",
            "KEEPALIVE=off and DD_USE_KEEPALIVE=1 contradict each other, expected one of them",
        ),
    ],
)
def test_what_would_be_ignored_is_an_error(variables: str, finding: str) -> None:
    """One finding, which names the variable and says what was expected."""
    with pytest.raises(PolicyError) as error:
        read(_parsed(variables))
    assert error.value.findings == (finding,)


def test_every_wrong_variable_is_named() -> None:
    """What is wrong is said all at once."""
    with pytest.raises(PolicyError) as error:
        read(_parsed("KEEPIDLE=0 KEEPCNT=0 DD_DEBUG=2"))
    assert [finding.partition(":")[0] for finding in error.value.findings] == [
        "KEEPIDLE", "KEEPCNT", "DD_DEBUG",
    ]  # fmt: skip


@pytest.mark.parametrize("key", VARIABLES)
def test_what_is_decided_is_not_looked_at(key: str) -> None:
    """What the command line gives needs no variable, be it wrong."""
    assert read(dict.fromkeys(VARIABLES[key], "wrong"), (key,)) == Asked()


def test_derived_user_timeout_may_be_of_what_is_decided() -> None:
    """The command line's times are as good for it as the environment's."""
    variables = _parsed("TCP_USER_TIMEOUT=-1 TCP_KEEPIDLE=9")
    asked = read(variables, ("interval", "probes"))
    assert asked.options == {"idle": "9", "user_timeout": "auto"}


@given(
    any_.dictionaries(any_.sampled_from(NAMES), any_.text(max_size=12) | any_.integers().map(str))
)
def test_what_is_read_is_what_policy_files_take(variables: dict[str, str]) -> None:
    """Whatever the variables are, they are refused, or options of the policy language."""
    try:
        asked = read(variables)
    except PolicyError:
        return
    for key, text in asked.options.items():
        options.check(key, text)


def _parsed(variables: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in variables.split())
