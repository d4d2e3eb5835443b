"""The mark of a job that has ended: where deleting its folder is cut short, the same command finds what it did."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duovsr.engine.identity import digest_of
from duovsr.errors import Remark
from duovsr.video.images import image_files, is_pattern
from duovsr.video.output import ENDED, PUBLISHING, disk_errors, fsync, fsync_folder, is_stamped, job_folder, stamps_left


@dataclass(frozen=True)
class Ended:
    """What a job did whose files all have their names."""

    frames: int
    notices: list[str]


def mark_ended(destination: Path, identity: dict[str, Any], ended: Ended) -> None:
    """Turn the stamps of the job's files into the mark: from here on nothing else of its folder is of use."""
    folder = job_folder(destination)
    notices = [(notice, isinstance(notice, Remark)) for notice in ended.notices]
    with disk_errors(folder):
        with (folder / PUBLISHING).open("a") as stamps:
            stamps.write(f"\n{json.dumps([digest_of(identity), ended.frames, notices])}")
        fsync(folder / PUBLISHING)
        os.replace(folder / PUBLISHING, folder / ENDED)
        fsync_folder(folder)


def ended_before(destination: Path, identity: dict[str, Any]) -> Ended | None:
    """What the job of this identity did, if the mark says that one ended, and its files are still in place."""
    mark = job_folder(destination) / ENDED
    try:
        digest, frames, notices = json.loads(mark.read_text().rpartition("\n")[2])
    except (OSError, ValueError, TypeError):
        return None
    stamps = stamps_left(destination)
    in_place = sum(is_stamped(path, stamps) for path in image_files(destination) or [destination])
    if digest != digest_of(identity) or in_place < (frames if is_pattern(destination) else 1):
        return None
    return Ended(frames, [Remark(notice) if is_remark else notice for notice, is_remark in notices])
