"""Drop-ins that commands write: what they say, and that they say it in one way only."""

from __future__ import annotations

from ipaddress import IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as any_

from kabpf.errors import RefusedError
from kabpf.policy import containers, of_commands, parser, selectors, writer
from kabpf.policy.files import FILE_SIZE_MAX
from kabpf.policy.model import (
    Condition,
    Destination,
    Direction,
    Mode,
    Options,
    Policy,
    Range,
    Rules,
    Selector,
    Until,
)
from kabpf.policy.yaml import Source

FILE = of_commands.RUNTIME / "some.yaml"
SOURCE = Source(str(FILE), 1)
COMMENT = "Written by a test."


def range_up_to(limit: int) -> any_.SearchStrategy[Range | None]:
    bounds = any_.tuples(any_.integers(1, limit), any_.integers(1, limit))
    return any_.none() | bounds.map(lambda pair: Range(*sorted(pair)))


options = any_.builds(
    Options,
    any_.just(True),
    range_up_to(32767),
    range_up_to(32767),
    range_up_to(127),
    range_up_to(2**31 - 1) | any_.integers(1, 2147483).map(lambda s: Range.exactly(s * 1000)),
    any_.integers(0, 50),
    any_.none() | any_.integers(1, 127),
    any_.none() | any_.integers(1000, 2**31 - 1),
)
off = any_.just(Options(keepalive=False))

networks = any_.builds(
    lambda address, length: IPv6Network((address >> 128 - length << 128 - length, length)),
    any_.integers(0, 2**128 - 1) | any_.integers(0xFFFF << 32, (0x10000 << 32) - 1),
    any_.integers(0, 128),
)
ports = any_.sets(any_.integers(1, 65535), max_size=3).map(lambda found: tuple(sorted(found)))
destinations = any_.lists(any_.builds(Destination, networks, ports, off | options), max_size=3)

# What is no letter, and what is beyond 16 bits, is as likely as the rest.
characters = (
    any_.sampled_from(" \"'\\#:,{}[]&*!|>%@`?-~.é\u0301\U0001f600\U000e0100")
    | any_.characters(blacklist_categories=("C", "Z"))
).filter(lambda each: each.isprintable() and each != "/")
names = any_.text(characters, min_size=1, max_size=20).filter(
    lambda name: name not in (".", "..") and (name == "**" or "**" not in name)
)
paths = any_.lists(names, max_size=4).map(lambda found: "/" + "/".join(found))
units = any_.builds(
    lambda stem, type: f"{stem}.{type}".replace("@.", "@*."),  # a template's instances
    any_.text(any_.sampled_from("aZ09:_.\\@*?[]!-"), min_size=1).filter(
        lambda stem: stem[0] != "@"
    ),
    any_.sampled_from(selectors.UNIT_TYPES),
)
kinds_and_texts = any_.tuples(any_.just("cgroup"), paths) | any_.tuples(
    any_.sampled_from(("unit", "user_unit")), units
)
selector = kinds_and_texts.map(lambda each: Selector(*each, SOURCE))


@any_.composite
def of_containers(draw: any_.DrawFn) -> Selector:
    """Any selector of containers or pods, its conditions in the order of its keys."""
    kind = draw(any_.sampled_from([*containers.KEYS]))
    text = any_.text(characters | any_.just("/"), min_size=1, max_size=20)
    some = any_.lists(any_.sampled_from(containers.KEYS[kind]), min_size=1, unique=True)
    conditions: list[Condition] = []
    for key in sorted(draw(some), key=containers.KEYS[kind].index):
        if key in containers.OF_KEYS:
            pairs = draw(any_.dictionaries(text, text, min_size=1, max_size=3))
            conditions += [Condition(key, *pair) for pair in pairs.items()]
        else:
            glob = text if key != "engine" else any_.sampled_from(("docker", "*", "[cp]*"))
            conditions.append(Condition(key, "", draw(glob)))
    return containers.of(kind, tuple(conditions), SOURCE)


selector |= of_containers()


@any_.composite
def policies(draw: any_.DrawFn) -> Policy:
    """Any policy that files can make."""
    own = draw(off | options)
    theirs = draw(destinations)
    for place, each in enumerate(theirs):
        if each.options.keepalive and own.keepalive:
            # A destination has all that its policy has, as parser.combine() makes it.
            keys = ("idle_s", "interval_s", "probes", "syn_retries", "connect_timeout_ms")
            whole = {key: getattr(each.options, key) or getattr(own, key) for key in keys}
            theirs[place] = each._replace(options=each.options._replace(**whole))
    rules = Rules(
        own,
        draw(any_.sampled_from(Mode)),
        draw(any_.sampled_from(Direction)),
        draw(any_.booleans()),
        tuple(theirs),
    )
    until = draw(any_.none() | any_.builds(Until, paths, any_.integers(0, parser.ID_MAX)))
    offered = draw(any_.booleans())
    return Policy(
        FILE.stem,
        tuple(draw(any_.lists(selector, min_size=0 if offered else 1, max_size=3))),
        rules,
        SOURCE,
        draw(any_.booleans()),
        draw(any_.booleans()),
        until,
        draw(any_.none() | any_.integers(0, parser.OWNER_MAX)) if until else None,
        offered=offered,
    )


def read(text: str, *others: tuple[str, str]) -> Policy:
    """The policy of a drop-in beside other files, as if it had been made of values."""
    files = [*others, (str(FILE), text)]
    parsed = [parser.parse(content.encode(), path) for path, content in files]
    (found,) = parser.combine(parsed)
    selected = tuple(each._replace(source=SOURCE) for each in found.selectors)
    return found._replace(selectors=selected, source=SOURCE, origins={}, warnings=())


@given(policies())
def test_what_is_written_makes_the_same_policy(policy: Policy) -> None:
    """Whatever the policy is, the parser finds all of it, and nothing else."""
    written = writer.text(policy, COMMENT)
    assert read(written) == policy
    assert writer.until_of(written) == policy.until


@given(any_.text())
def test_comment_is_one_line(comment: str) -> None:
    """A comment writes nothing but itself, whatever it is made of."""
    policy = Policy("some", (Selector("cgroup", "/", SOURCE),), Rules(Options()), SOURCE)
    first, *rest = writer.text(policy, comment).splitlines()
    assert first.startswith("# ") and first.isprintable()
    assert len(first) <= writer.COMMENT_MAX + len("# ...")
    assert rest == ["select: [{cgroup: /}]", "keepalive: on"]


def test_name_with_a_newline_stays_in_its_comment() -> None:
    """A file's name can't add a key to the policy that speaks of it; it is shown as in messages."""
    policy = Policy("some", (Selector("cgroup", "/", SOURCE),), Rules(Options()), SOURCE)
    text = writer.text(policy, "In place of libdontdie: /env.d/a\nmode: enforce\n#é.env:1")
    first = r"# In place of libdontdie: /env.d/a\nmode: enforce\n#\xe9.env:1"
    assert text.splitlines()[0] == first
    assert read(text).rules.mode == Mode.FILL


def test_words_stay_as_they_were_spelled() -> None:
    """Options that a person gave are in the file as that person wrote them; `auto` and `off` so
    stay what they are where defaults change."""
    policy = Policy("some", (Selector("cgroup", "/a b", SOURCE),), Rules(Options()), SOURCE)
    text = writer.text(policy, COMMENT, {"idle": "1m", "user_timeout": "auto"})
    assert text == (
        f"# {COMMENT}\n"
        'select: [{cgroup: "/a b"}]\n'
        "keepalive: {idle: 1m, user_timeout: auto}\n"
    )  # fmt: skip
    defaults = ("/etc/kabpf/policy.yaml", "defaults: {interval: 10, probes: 3}")
    assert read(text, defaults).rules.options.user_timeout_ms == Range.exactly(90_000)


def test_whole_drop_in_reads_well() -> None:
    """All that a drop-in can say, in kabpf.yaml(5)'s order, with units as people write them."""
    whole = Options(True, Range(60, 60), Range(5, 10), Range(3, 9), Range(1500, 90000), 10, 4)
    few = Options(True, Range(5, 9), Range(5, 5), Range(3, 3), syn_retries=4)
    destinations = (
        Destination(IPv6Network("::ffff:10.0.0.0/104"), (22, 5432), Options(keepalive=False)),
        Destination(IPv6Network("2001:db8::/32"), (), few),
    )
    policy = Policy(
        "some",
        (Selector("unit", "db.service", SOURCE), Selector("user_unit", "*.service", SOURCE)),
        Rules(whole, Mode.ENFORCE, Direction.OUT, False, destinations),
        SOURCE,
        existing=False,
        log=True,
        until=Until("/a", 7),
        owner=1000,
        offered=True,
    )
    text = writer.text(policy, COMMENT)
    assert read(text) == policy
    assert text.splitlines() == [
        f"# {COMMENT}",
        'select: [{unit: db.service}, {user_unit: "*.service"}]',
        "offered: true",
        "keepalive: {idle: 60s, interval: 5s..10s, probes: 3..9, user_timeout: 1500ms..90000ms,"
        " jitter: 10%, syn_retries: 4}",
        "mode: enforce",
        "direction: out",
        "destinations:",
        '  - {to: "10.0.0.0/8", ports: [22, 5432], keepalive: off}',
        '  - {to: "2001:db8::/32", idle: 5s..9s, interval: 5s, probes: 3, syn_retries: 4,'
        " user_timeout: off, jitter: 0%, connect_timeout: off}",
        "loopback: false",
        "existing: false",
        "log: sockets",
        'until: {cgroup: "/a", id: 7}',
        "owner: 1000",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '# Written by kabpfctl run; it goes with the cgroup.\n'
        'until: {cgroup: "/a \\"b\\"", id: 7}\nselect: [{cgroup: "/a \\"b\\""}]\nkeepalive: on\n'
        "mode: fill\ndirection: both\nloopback: true\nexisting: false\nlog: off\n",
        '# Written for uid 1000; kabpfctl detach removes it.\n'
        'select: [{cgroup: "/a \\"b\\""}]\nkeepalive: {idle: 60s}\nmode: fill\nexisting: true\n'
        'until: {cgroup: "/a \\"b\\"", id: 7}\nowner: 1000\n',
    ],
)  # fmt: skip
def test_end_of_what_older_versions_wrote_is_found(text: str) -> None:
    """Drop-ins that an upgrade finds end with their cgroups, too."""
    assert writer.until_of(text) == read(text).until == Until('/a "b"', 7)


@pytest.mark.parametrize("path", ["/a\nb", "/a\x85b", "/a\udcffb", "/a\u202eb"])
def test_path_that_can_not_be_printed_is_refused(path: str) -> None:
    """What no policy file can say is not written."""
    policy = Policy("some", (Selector("cgroup", path, SOURCE),), Rules(Options()), SOURCE)
    with pytest.raises(RefusedError, match="expected a path that can be printed"):
        writer.text(policy, COMMENT)


def test_file_is_never_too_large_to_be_read() -> None:
    """A policy that makes too large a file is refused, as the file would be."""
    many = (Selector("cgroup", "/" + "é" * 100, SOURCE),) * (FILE_SIZE_MAX // 200)
    with pytest.raises(
        RefusedError, match=f"policy some makes .* expected at most {FILE_SIZE_MAX}"
    ):
        writer.text(Policy("some", many, Rules(Options()), SOURCE), COMMENT)
