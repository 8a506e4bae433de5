"""What messages show of files that root was given to check and that are no policy files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kabpf.errors import PolicyError
from kabpf.policy import files

SECRET = "hunter2"
TEXTS = {
    "a line of /etc/shadow": f"{SECRET}:$6$hunter2$hunter2:19000:0:99999:7:::\n",
    "the last of its fields empty": "root:*hunter2:20228:0:99999:7:::\n",
    "a key": "-----BEGIN-hunter2-----\nhunter2\n-----END-----\n",
    "a token": "hunter2\n",
    "a quoted token": "'hunter2'\n",
    "a list": "- hunter2\n- hunter2\n",
    "a variable": "hunter2: hunter2\n",
    "a variable that is a list": "password: [hunter2]\n",
    "twice": "hunter2: a\nhunter2: b\n",
    "twice, below": "db:\n  hunter2: a\n  hunter2: b\n",
    "an alias": "*hunter2\n",
    "an alias, below": "db: {a: *hunter2}\n",
    "an anchor": "&hunter2 a\n",
    "a tag": "!hunter2 a\n",
    "a mapping as key": "{hunter2: hunter2}: a\n",
    "too deep": "hunter2: [[[[[[[[[[hunter2]]]]]]]]]]\n",
    "not YAML": "hunter2: [\n",
    "two documents": "a: hunter2\n---\nhunter2\n",
    "control characters": 'hunter2: "\\ehunter2"\n',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_nothing_of_another_file_is_shown(tmp_path: Path, text: str) -> None:
    """The message has the place, and what was expected."""
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(PolicyError) as raised:
        files.read(file)
    assert str(raised.value).startswith(f"{file}:")
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keepalive: {idel: 60}\n", "keepalive.idel: unknown key, did you mean idle?"),
        ("keepalve: {idle: 60}\n", "?: unknown key, did you mean keepalive?"),
        ("keepalive: {idle: x}\n", "keepalive.idle: x, expected"),
        (
            "policies: {a: {select: [{unit: a.service}], keepalive: on, mode: no}}\n",
            "policies.a.mode: no, expected",
        ),
    ],
)
def test_mistakes_in_a_draft_of_a_policy_are_shown(tmp_path: Path, text: str, message: str) -> None:
    """A file that is to become a policy file is judged by its keys."""
    file = tmp_path / "nginx.service.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError) as raised:
        files.read(file)
    assert f"{file}:1: {message}" in str(raised.value)
