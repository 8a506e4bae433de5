"""What `kabpfctl import` makes of units, against what each release's own systemd makes of them."""

import json
import re

LIBRARY = "/usr/lib/libkeepalive.so"  # which is not there, as the loader does not mind

FILES = {
    "/etc/systemd/system/db-one@.service": (
        "[Service]\nExecStart=/usr/bin/env KEEPCNT=4 sleep infinity\n"
        f'Environment="LD_PRELOAD={LIBRARY}" SPACES="a  b" \'QUOTES=it"s\' ESCAPES=\\x41\\t\\"%%\n'
        "EnvironmentFile=-/etc/default/db-%i\nEnvironmentFile=-/etc/default/none*\n"
        "Environment=SPECIFIERS=%n,%N,%p,%i KEEPIDLE=1 GONE=1 \\\n# between\n  KEEPINTVL=7\n"
        'UnsetEnvironment=GONE %p-GONE TOO=%i\nEnvironment=TOO=x HALF=1 "\nEnvironment=STAYS=%%p\n'
        "Environment=SPACE=1 \\ \nEnvironment=TWICE=a\\\\\nEnvironment=1NO=1 NO-NO=1 =1 LONE\n"
        "Environment='GLUED='1\"2 3\"\r\n"
        "Environment=LAST=1 \\\n  ATEND=1 \\"
    ),
    "/etc/systemd/system/db-one@x.service.d/50-last.conf": "[Service]\nEnvironment=ORDER=50\n",
    "/etc/systemd/system/db-one@.service.d/40-template.conf": "[Service]\nEnvironment=ORDER=40\n",
    "/run/systemd/system/db-.service.d/60-begin.conf": "[Service]\nEnvironment=BEGIN=1\n",
    "/etc/systemd/system/db-@x.service.d/45-begin.conf": "[Service]\nEnvironment=INSTANCE=1\n",
    "/usr/lib/systemd/system/service.d/50-last.conf": "[Service]\nEnvironment=HIDDEN=1\n",
    "/usr/lib/systemd/system/service.d/70-all.conf": "[Service]\nEnvironment=ALL=1\n",
    "/etc/default/db-x": (
        "# one\nKEEPIDLE=\"60\"\nexport NO=1\n TRAILING = a b  \nSINGLE='$x \\'\nJOINED=1\\\n2\n"
        'BACKSLASH=a\\\\b\\c\nTWO="x" y\nCOMMENTED=1 # 2\n  # no\n;NO=1\n'
        'RETURN=1\r\nEMPTY=\nINNER=a"b"c\nSPREAD=1\\\n  2\n'
        "LINES=\"a\nb\\\nc\\d\\$\" 'e\\f'  g  \nBLANK=a\\  \nHALVES='x'y\"z\"\nENDS=1\\"
    ),
}
UNIT = "db-one@x.service"

OURS = f"""
import json
from pathlib import Path
from kabpf.migration.files import Files
from kabpf.migration.preloads import Search
from kabpf.migration.wanted import WATCHED
from kabpf.systemd.unit_files import Units
from kabpf.systemd.units import DIRECTORIES
search = Search(Files(Path("/")), WATCHED)
(found,) = (given for place, _, given in search.find() if place.name == "{UNIT}")
(started,) = found.main
files = Units([Path(directory) for directory in DIRECTORIES["unit"]]).files("{UNIT}")
values = {{name: one.value for name, one in started.environment.items()}}
print(json.dumps([list(map(str, files)), values]))
"""


def test_environment_is_systemds(machine):
    """The files of a unit, their order and the environment that they make are those of systemd."""
    for path, text in FILES.items():
        machine.write(path, text)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", UNIT)
    files, values = json.loads(machine.run("python3", "-c", OURS))
    paths = [machine.show(UNIT, name) for name in ("FragmentPath", "DropInPaths")]
    assert files == " ".join(paths).split()
    pid = machine.show(UNIT, "MainPID")
    given = machine.run("cat", f"/proc/{pid}/environ").split("\0")
    theirs = dict(each.split("=", 1) for each in given if each)
    named = set(re.findall(r"\b[A-Z_]+(?= ?=)", "".join(FILES.values())))
    assert values == {name: value for name, value in theirs.items() if name in named}
