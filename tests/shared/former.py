"""The last version whose maps have another layout, as the repository's history has it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import headers

ROOT = Path(__file__).parents[2]

# The parent of ded9ee4, which raised the layout from 5 to 6. After a release it is the release.
COMMIT = "d0f631b0397662fe956220b846748deb609de200"


def extract(directory: Path, *paths: str) -> Path:
    """Put these of its files, or all, into a directory. Skips the test where there is no history
    that has them, or fails it where KABPF_REQUIRE says that there has to be."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    if (
        not shutil.which("git")
        or subprocess.run(
            [*git, "cat-file", "-e", f"{COMMIT}^{{commit}}"], capture_output=True
        ).returncode
    ):
        headers.lack(f"there is no git, or no clone of it all: {COMMIT[:12]} is missing", "kernel")
    archive = subprocess.run([*git, "archive", COMMIT, *paths], check=True, stdout=subprocess.PIPE)
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", directory], check=True, input=archive.stdout)
    return directory


def package(scratch: Path) -> Path:
    """Its Debian package, which is built once and kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "/var/cache"), "kabpf-tests")
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / f"former-{COMMIT[:12]}.deb"
    with open(cache / "former.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            tree = extract(scratch / "former")
            done = subprocess.run([tree / "scripts/package"], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            fresh = kept.with_suffix(".new")
            shutil.copy(done.stdout.splitlines()[-1], fresh)
            fresh.rename(kept)
    return kept
