"""The policy files as the daemon has read them."""

from __future__ import annotations

from pathlib import Path

from kabpf.policy import files
from kabpf.policy.files import Directories, Snapshot
from kabpf.policy.of_commands import RUNTIME, TRANSIENT


class PolicyFiles:
    """What the daemon knows of the policy files: what it read last, and what was good last.

    Drop-ins that end with a cgroup are no files that may wait for a reload.
    """

    def __init__(self, directories: Directories) -> None:
        self._directories = directories
        self._cache: files.Cache = {}
        self._seen = ""  # the stamp of those that were read last, good or wrong
        self._seen_lasting = ""  # of those of them that do not end with a cgroup
        self.good: Snapshot | None = None
        self.have_been_good = False  # since the start

    def read(self) -> Snapshot:
        """Read what has changed. Raises PolicyError, and then the last good ones stay."""
        # Together: the stamp of files that are wrong would be noted beside the last good policies.
        marks = files.marks(self._directories)
        self._seen, self._seen_lasting = files.digest(marks), _lasting_stamp(marks)
        self.good = Snapshot(self._seen, files.load(self._directories, self._cache))
        self.have_been_good = True
        return self.good

    def have_changed(self) -> bool:
        """Whether they differ from those that were read last, good or wrong. Raises PolicyError
        where that can't be told."""
        return files.stamp(self._directories) != self._seen

    def restore(self, kept: Snapshot) -> Snapshot:
        """Take policies for the last good ones that were kept; the files, which are wrong, wait."""
        self.good = kept
        return self.read_transient()

    def are_waiting(self) -> bool:
        """Whether files have changed that were not read, besides those that end with a cgroup."""
        return _lasting_stamp(files.marks(self._directories)) != self._seen_lasting

    def read_transient(self) -> Snapshot:
        """Read those that end with a cgroup, and have all others wait; there are good ones."""
        assert self.good is not None
        standing = [
            policy
            for policy in self.good.policies
            if not policy.until
            or (Path(policy.source.path).parent == RUNTIME and Path(policy.source.path).exists())
        ]
        of_commands = files.load(Directories(TRANSIENT / "none", (TRANSIENT,)))
        self.good = self.good._replace(policies=(*standing, *of_commands))
        return self.good


def _lasting_stamp(marks: files.Marks) -> str:
    """The stamp of those that do not end with a cgroup."""
    ending = {
        path
        for path in marks
        if path == RUNTIME or TRANSIENT in (path, path.parent) or files.is_of_user(path)
    }
    return files.digest(marks, ending)
