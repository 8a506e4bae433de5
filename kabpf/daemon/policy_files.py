"""The policy files as the daemon has read them."""

from __future__ import annotations

from kabpf.apply import waiting
from kabpf.apply.waiting import Known
from kabpf.errors import PolicyError
from kabpf.policy import files
from kabpf.policy.files import Directories, Snapshot
from kabpf.policy.of_commands import RUNTIME, TRANSIENT
from kabpf.runtime.last_good import Kept


class PolicyFiles:
    """What the daemon knows of the policy files: what it read last, and what was good last.

    Drop-ins that commands write are no files that may wait for a reload.
    """

    def __init__(self, directories: Directories) -> None:
        self._directories = directories
        self._cache: files.Cache = {}
        self._seen = ""  # the stamp of those that were read last, good or wrong
        self._seen_lasting = ""  # of those of them that may wait
        self._known: Known | None = None  # of those that were good last
        self.good: Snapshot | None = None
        self.have_been_good = False  # since the start

    def read(self) -> Snapshot:
        """Read what has changed. Raises PolicyError, and then the last good ones stay."""
        # Together: the stamp of files that are wrong would be noted beside the last good policies.
        marks = files.marks(self._directories)
        self._seen, self._seen_lasting = files.digest(marks), _lasting_stamp(marks)
        self.good = files.snapshot(self._directories, self._cache, marks)
        self._known = Known(
            self.good.lasting,
            {
                path: parsed
                for path, (_, parsed) in self._cache.items()
                if not files.is_of_command(path)
            },
        )
        self.have_been_good = True
        return self.good

    def have_changed(self) -> bool:
        """Whether they differ from those that were read last, good or wrong. Raises PolicyError
        where that can't be told."""
        return files.stamp(self._directories) != self._seen

    def restore(self, kept: Kept) -> Snapshot:
        """Take policies for the last good ones that were kept; the files, which are wrong, wait."""
        self._known = Known(kept.stamp, kept.parsed())
        return self._active(waiting.beside(self._known, self._directories))

    def are_waiting(self) -> bool:
        """Whether files have changed that were not read, besides those that commands write."""
        return _lasting_stamp(files.marks(self._directories)) != self._seen_lasting

    def follow(self) -> Snapshot:
        """Read what commands have written, or made active; all else waits for a reload."""
        standing = waiting.look(self._directories, self._known, is_loaded=self.good is not None)
        if standing.wait:
            return self._active(standing)
        try:
            return self.read()
        except PolicyError:  # without a change of theirs, as where a directory is somebody's now
            return self._active(standing)

    def _active(self, standing: waiting.Standing) -> Snapshot:
        self.good = standing.active().snapshot
        return self.good


def _lasting_stamp(marks: files.Marks) -> str:
    """The stamp of those that commands do not write."""
    besides = {path for path in marks if path in (RUNTIME, TRANSIENT) or files.is_of_command(path)}
    return files.digest(marks, besides)
