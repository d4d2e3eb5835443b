"""Resumable work: a folder beside the target that holds finished pieces, a journal, and the model's latest states."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import torch
from filelock import FileLock, Timeout

from duovsr.engine.blend import Tail
from duovsr.engine.ended import Ended, ended_before, mark_ended
from duovsr.engine.identity import difference, digest_of
from duovsr.engine.plan import Plan
from duovsr.engine.run import States
from duovsr.errors import Remark, UsageError
from duovsr.model.one_step import RestoreState
from duovsr.model.tiny_vae import VAEState
from duovsr.model.transformer import TransformerState
from duovsr.repository import sha256_of
from duovsr.video.encoder import VideoEncoder
from duovsr.video.mux import Piece
from duovsr.video.output import ENDED, PUBLISHING, disk_errors, fsync, fsync_folder, job_folder, stamp

# What a job writes, in the order in which it goes: what is left without the record is not taken for unfinished work.
_WORK = (PUBLISHING, "job.json", "journal.jsonl", "piece_*.mkv", "state_*.pt", "*.part")
_ABOUT = ("owner", "lock", ENDED)  # go after it: the mark tells that a job has ended until nothing else is left
_STATES_KEPT = 2  # the last is for going on, the one before in case the last piece turns out to be damaged


@dataclass(frozen=True)
class _Entry:
    """A line of the journal: what a piece holds, and how to tell that it still does."""

    piece: int
    pts: list[int]
    reordering: int
    bytes: int
    sha256: str
    state_sha256: str | None  # of the state that the next piece starts from
    notices: list[str]


class Job:
    """The unfinished work on one target: `TARGET.duovsr/`. Open for one process at a time.

    `identity` is all that the pixels depend on; a folder of another identity is refused, or discarded by `restart`.
    `plan` is the recorded one, whatever memory is free today. Nothing in the folder is trusted: the record, which holds
    both, counts if it has its own sha256, a line of the journal if it begins with its own, and a piece if its size and
    sha256 are those of its line. Without the record the work begins anew. Leaving the context keeps the folder if it
    holds a piece, unless the work is one that cannot be gone on with, not `resumable`, which has no record either.
    Where a job was stopped while it deleted the folder, and was the same in all that the output depends on, which is
    `beside` too, `ended` is what it did, and leaving deletes the rest.
    """

    def __init__(
        self,
        destination: Path,
        identity: dict[str, Any],
        plan: Plan,
        *,
        beside: Sequence[object] = (),
        restart: bool,
        resumable: bool = True,
    ) -> None:
        self._resumable = resumable
        self.folder = job_folder(destination)
        self.plan = plan
        self.ended: Ended | None = None
        self._whole = {**identity, "beside": beside}
        self._destination = destination
        self._entries: dict[int, _Entry] = {}
        self._redo: set[int] = set()
        self._notices: list[str] = []
        self._lock = FileLock(self.folder / "lock")
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            fsync_folder(self.folder.parent)
        self._check_files()
        self._take_lock()
        try:
            with disk_errors(self.folder / "job.json"):
                self._open(json.loads(json.dumps(identity)), restart)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with disk_errors(self.folder / "lock"):
                self._tidy_up()
        finally:
            self._lock.release()

    def _tidy_up(self) -> None:
        if self._entries and self._resumable:
            self._clear_partial()  # it may be what fills the disk
            return
        self._clear()
        for name in _ABOUT:
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else lies in it
            self.folder.rmdir()

    @property
    def notices(self) -> list[Remark]:
        """Its own, and the steps down of the pieces, each once."""
        of_pieces = (notice for entry in self._entries.values() for notice in entry.notices)
        return [Remark(notice) for notice in dict.fromkeys([*self._notices, *of_pieces])]  # the journal keeps no types

    @property
    def bytes(self) -> int:
        """Of the pieces that are there."""
        return sum(entry.bytes for entry in self._entries.values())

    def needs(self, piece: int) -> bool:
        """Whether the piece has to be made: it is missing, damaged, or its states lead to one that is."""
        return piece in self._redo or piece not in self._entries

    def path(self, piece: int) -> Path:
        return self.folder / f"piece_{piece:06d}.mkv"

    @property
    def partial(self) -> Path:
        """Of the piece that is being written."""
        return self.folder / "piece.part"

    def load_states(self, piece: int, device: torch.device) -> States:
        """The states that the piece starts from; only of pieces that `needs` asks for after one it does not."""
        with torch.serialization.safe_globals([RestoreState, VAEState, TransformerState, Tail]):
            states: States = torch.load(self._state_path(piece), map_location=device, weights_only=True)
        return states

    def commit(self, piece: int, encoder: VideoEncoder, states: States, notices: Sequence[str]) -> None:
        """Take the encoder's closed file as the piece; `states` are what the next one starts from."""
        partial, path = self.partial, self.path(piece)
        if (found := _count_packets(partial)) != len(encoder.written_pts):
            raise AssertionError(f"`{partial}` has {found} packets of {len(encoder.written_pts)} frames")
        with disk_errors(path):
            state_sha256 = None if self.plan.independent else self._save_states(piece + 1, states)
            fsync(partial)
            entry = _Entry(
                piece=piece,
                pts=list(encoder.written_pts),
                reordering=encoder.reordering,
                bytes=partial.stat().st_size,
                sha256=sha256_of(partial),
                state_sha256=state_sha256,
                notices=list(notices),
            )
            os.replace(partial, path)
            fsync_folder(self.folder)
            with self._journal.open("a") as journal:
                journal.write(_line(entry))
                journal.flush()
                os.fsync(journal.fileno())
            fsync_folder(self.folder)
            self._state_path(piece + 1 - _STATES_KEPT).unlink(missing_ok=True)
        self._entries[piece] = entry
        self._redo.discard(piece)

    def pieces(self) -> list[Piece]:
        """All pieces in order, once none is needed any more."""
        return [
            Piece(self.path(number), entry.pts, entry.reordering) for number, entry in sorted(self._entries.items())
        ]

    def begin_publishing(self, finished: Path) -> None:
        """From here on the file may have its final name: the same command may go on over it."""
        with disk_errors(self.folder):
            with (self.folder / PUBLISHING).open("a") as stamps:
                stamps.write(f"\n{stamp(finished)}")  # apart from a line that a crash cut off
                stamps.flush()
                os.fsync(stamps.fileno())
            fsync_folder(self.folder)

    def end(self, frames: int, notices: list[str]) -> None:
        """The target is in place: nothing of the job is of use."""
        if self._resumable:
            mark_ended(self._destination, self._whole, Ended(frames, notices))
        self._entries.clear()

    def _check_files(self) -> None:
        for path in (path for pattern in (*_ABOUT, *_WORK) for path in self.folder.glob(pattern)):
            if path.is_dir() or path.is_symlink():  # through which another file would be written
                raise UsageError(f"unfinished work would need a file named `{path}`", hint="move the folder away")

    def _take_lock(self) -> None:
        owner = self.folder / "owner"
        with disk_errors(self.folder / "lock"):
            try:
                self._lock.acquire(blocking=False)  # the system frees it when its holder dies, however it dies
            except Timeout:
                who = owner.read_text(errors="replace") if owner.exists() else "another process"
                raise UsageError(
                    f"{who} is working on `{self._destination}`", hint="wait for it, or choose another target"
                ) from None
        with disk_errors(owner):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")

    def _open(self, identity: dict[str, Any], restart: bool) -> None:
        record = self.folder / "job.json"
        if (self.folder / ENDED).exists():
            if self._resumable and not restart:
                self.ended = ended_before(self._destination, self._whole)
            if self.ended is not None:
                return
            self._clear()
            (self.folder / ENDED).unlink()
        known = _read_record(record)
        if known is not None and not restart:
            if known.get("identity") != identity:
                changed = difference(known["identity"], identity)
                raise UsageError(
                    f"an unfinished job for `{self._destination}` had another {changed}",
                    hint="use --restart to begin anew, or repeat the command that began it",
                )
            self.plan = Plan.from_json(known["plan"])
            self._read_journal()
            self._replace(self._journal, "".join(map(_line, self._entries.values())))  # without what does not count
        else:
            if known is None and not restart:
                self._check_nothing_is_named()
                if record.exists():
                    self._notices.append("the record of the unfinished job was damaged: it began anew")
            self._clear()
            content = {"identity": identity, "plan": self.plan.to_json()}
            if self._resumable:
                self._replace(record, json.dumps({"sha256": digest_of(content), **content}, indent=1))
        self._clear_partial()

    def _check_nothing_is_named(self) -> None:
        """Work that begins anew may be other work, and must not go on over what the old one put in place."""
        if (self.folder / PUBLISHING).exists():
            raise UsageError(
                f"the record of the unfinished job for `{self._destination}` is lost or damaged",
                hint="use --restart to begin anew, with --overwrite if some of its output is in place",
            )

    def _replace(self, path: Path, content: str) -> None:
        partial = path.with_suffix(".part")
        partial.write_text(content)
        fsync(partial)
        os.replace(partial, path)
        fsync_folder(self.folder)

    def _clear_partial(self) -> None:
        """Delete what is written anew in any case."""
        for leftover in self.folder.glob("*.part"):
            leftover.unlink()

    def _clear(self) -> None:
        """Delete what a job writes, and nothing else."""
        for pattern in _WORK:
            for path in self.folder.glob(pattern):
                path.unlink()

    def _read_journal(self) -> None:
        lines = self._journal.read_text(errors="replace").splitlines() if self._journal.exists() else []
        for line in lines:  # a later line about the same piece counts
            digest, _, content = line.partition(" ")
            if hashlib.sha256(content.encode()).hexdigest() == digest:  # else it is cut off, or altered
                entry = _Entry(**json.loads(content))
                self._entries[entry.piece] = entry
        damaged = [number for number, entry in self._entries.items() if not self._holds(number, entry)]
        damaged += set(range(max(self._entries, default=-1))) - set(self._entries)  # the line was lost
        for number in damaged:
            self._entries.pop(number, None)
        for number in [*damaged, max(self._entries, default=-1) + 1]:  # where to begin, to have the states for each
            first = number
            while first > 0 and not self._has_states(first):
                first -= 1
            self._redo |= set(range(first, number))

    def _holds(self, number: int, entry: _Entry) -> bool:
        path = self.path(number)
        return path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256

    def _has_states(self, piece: int) -> bool:
        """Whether the piece can be made without the one before it."""
        if self.plan.independent:
            return True
        before, path = self._entries.get(piece - 1), self._state_path(piece)
        return before is not None and path.is_file() and sha256_of(path) == before.state_sha256

    @property
    def _journal(self) -> Path:
        return self.folder / "journal.jsonl"

    def _state_path(self, piece: int) -> Path:
        return self.folder / f"state_{piece:06d}.pt"

    def _save_states(self, piece: int, states: States) -> str:
        path = self._state_path(piece)
        partial = path.with_suffix(".part")
        content = io.BytesIO()  # torch would hide why a file cannot be written
        torch.save(states, content)
        with partial.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        digest = sha256_of(partial)
        os.replace(partial, path)
        return digest


def _count_packets(path: Path) -> int:
    with av.open(str(path.absolute())) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def _line(entry: _Entry) -> str:
    content = json.dumps(vars(entry))
    return f"{hashlib.sha256(content.encode()).hexdigest()} {content}\n"


def _read_record(path: Path) -> dict[str, Any] | None:
    """`job.json`; None where it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
        digest = content.pop("sha256")
        return content if digest == digest_of(content) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
