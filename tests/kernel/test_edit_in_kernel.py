"""kabpfctl edit on a terminal: the policy is active when it returns."""

import os
import pty
import subprocess

import pytest
from harness import BIN, UNTOUCHED, options_of_new, path_of

EDITOR = """\
#!/bin/sh
# Wrong at first, then right.
if grep -q 'idle: never' "$1"; then
	sed -i 's/never/61/' "$1"
else
	printf '%s' '{policy}' >"$1"
fi
"""


@pytest.mark.core
def test_edited_policy_is_active(cgroup, tmp_path, write_policy, peer, kabpfctl):
    """A wrong text is asked about and edited again; the right one covers new connections."""
    file = write_policy("a.yaml", "# nothing yet\n")
    policy = f'select: [{{cgroup: "{path_of(cgroup)}"}}]\nkeepalive: {{idle: never}}\n'
    editor = tmp_path / "editor"
    editor.write_text(EDITOR.replace("{policy}", policy))
    editor.chmod(0o755)
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            [BIN / "kabpfctl", "edit", "a.yaml"],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**os.environ, "SUDO_EDITOR": str(editor)},
        )
        os.write(ours, b"e\n")
        _, errors = process.communicate(timeout=60)
    finally:
        os.close(ours)
        os.close(theirs)
    assert (process.returncode, errors.decode().partition(", expected")[0]) == (
        0,
        f"{file}:2: keepalive.idle: never",
    )
    assert file.read_text() == policy.replace("never", "61")
    assert options_of_new(peer, cgroup) == UNTOUCHED | {"keepalive": 1, "idle": 61}
    assert not os.path.lexists("/run/kabpf/edit")
