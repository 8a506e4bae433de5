"""The policy files as the daemon has read them."""

from __future__ import annotations

from collections.abc import Collection

from kabpf.policy import files
from kabpf.policy.files import Directories, Snapshot


class PolicyFiles:
    """What the daemon knows of the policy files: what it read last, and what was good last."""

    def __init__(self, directories: Directories) -> None:
        self._directories = directories
        self._cache: files.Cache = {}
        self._seen = ""  # the stamp of those that were read last, good or wrong
        self.good: Snapshot | None = None

    def read(self) -> Snapshot:
        """Read what has changed. Raises PolicyError, and then the last good ones stay."""
        # Together: the stamp of files that are wrong would be noted beside the last good policies.
        self._seen = files.stamp(self._directories)
        self.good = Snapshot(self._seen, files.load(self._directories, self._cache))
        return self.good

    def have_changed(self) -> bool:
        """Whether they differ from those that were read last, good or wrong. Raises PolicyError
        where that can't be told."""
        return files.stamp(self._directories) != self._seen

    def forget(self, names: Collection[str]) -> Snapshot:
        """Leave policies out of the last good ones, of which there are some; files that wait to be
        read wait on."""
        assert self.good is not None
        kept = tuple(each for each in self.good.policies if each.name not in names)
        self.good = self.good._replace(policies=kept)
        return self.good
