"""Errors that people see: one line, a way out, and the exit code of DESIGN section 1.7."""

from __future__ import annotations

import errno

EXIT_OK = 0
EXIT_WARNINGS = 1


class Remark(str):
    """A notice of how something was done, such as a conversion: nothing is lost, and the exit code stays 0."""


class DuovsrError(Exception):
    """A failure that is the input's or the machine's, not the code's.

    `str(error)` is one line that names the file or value at fault; `hint` says the way out where there is one. Raised
    itself, and not as one of the classes below, it says that the output cannot be written to its end.
    """

    exit_code = 4

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(DuovsrError):
    """A flag or option value that cannot be used."""

    exit_code = 2


class InputError(DuovsrError):
    """An input that is missing, unreadable or not a video; also a model file that does not verify."""

    exit_code = 3


class NoSpaceError(DuovsrError):
    """The target's disk is full, or would be: nothing else can be written there either."""


def says_no_space(error: BaseException) -> bool:
    """Whether the system refused to write for want of space or quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class OutOfMemoryError(DuovsrError):
    """Memory ran out after every step down of the plan."""

    exit_code = 5


class Interrupted(DuovsrError):
    """Stopped as asked, with the work done so far kept. `exit_code`: 130 of SIGINT, 143 of SIGTERM and SIGHUP."""

    def __init__(self, message: str, *, hint: str | None = None, exit_code: int = 130) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


class TrainError(DuovsrError):
    """Training cannot go on (a non-finite loss, no usable data)."""

    exit_code = 1
