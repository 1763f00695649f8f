"""One exception tree for everything a user can get wrong.

::

    InvarError
    ├── ConfigError          a recipe or an override is wrong (all faults listed at once)
    ├── DataError            a corpus, a question file or a row of one is wrong
    ├── ArtifactError        a stored artifact cannot be used
    │   ├── MissingArtifactError      nothing is at that place
    │   ├── IncompleteArtifactError   a folder without its manifest: a run was cut off
    │   ├── CorruptArtifactError      a file is missing or differs from its manifest
    │   ├── MixedArtifactsError       two artifacts do not belong together
    │   └── ConflictError             another writer was faster
    ├── ModelError           a model or tokenizer cannot be resolved or does not fit
    ├── RequestError         a request to the service is wrong (HTTP 4xx)
    └── ResourceError        the machine or the cluster lacks something

Every message says what was got, what was expected and what to do.  Programming mistakes keep
Python's own exceptions (``ValueError``, ``TypeError``): they are bugs, not user input.
"""

from __future__ import annotations


class InvarError(Exception):
    """Root of the tree; the command line prints these without a traceback and exits 1.

    Args:
        got: what was found.
        expected: what should have been there.
        action: what the reader can do about it.
    """

    def __init__(self, got: str, *, expected: str = "", action: str = "") -> None:
        self.got, self.expected, self.action = got, expected, action
        parts = [got.rstrip(".")]
        if expected:
            parts.append(f"Expected: {expected.rstrip('.')}")
        if action:
            parts.append(f"To do: {action.rstrip('.')}")
        # What is listed line by line goes on with a line of its own.
        super().__init__(("\n" if "\n" in got else ". ").join(parts) + ".")

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # Ray sends exceptions between processes; the keyword-only arguments need help to survive
        # that.
        return _rebuild, (type(self), self.got, self.expected, self.action)


def _rebuild(kind: type[InvarError], got: str, expected: str, action: str) -> InvarError:
    return kind(got, expected=expected, action=action)


class ConfigError(InvarError):
    """A recipe, an override or their combination is wrong."""


class DataError(InvarError):
    """Input data is missing, unreadable or malformed."""


class ArtifactError(InvarError):
    """A stored artifact cannot be used."""


class MissingArtifactError(ArtifactError):
    """There is nothing at the given place."""


class IncompleteArtifactError(ArtifactError):
    """A folder is there but its manifest is not: whatever wrote it was cut off."""


class CorruptArtifactError(ArtifactError):
    """A file of an artifact is missing, or its content is not what the manifest recorded."""


class MixedArtifactsError(ArtifactError):
    """Artifacts that were not made for each other were put together."""


class ConflictError(ArtifactError):
    """Another writer changed what this one was about to change; nothing of this one's was
    written.
    """


class ModelError(InvarError):
    """A model, adapter or tokenizer cannot be resolved, loaded or combined."""


class RequestError(InvarError):
    """A request to the service is wrong; answered with a 4xx status."""


class ResourceError(InvarError):
    """The machine or cluster lacks memory, disk, a GPU or a package."""
