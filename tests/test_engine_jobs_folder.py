"""The folder of a job where somebody else may write, where nobody may, and where little is free."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from duovsr import UpscaleOptions
from duovsr.engine import files
from duovsr.errors import DuovsrError, Interrupted, NoSpaceError, UsageError
from tests.bicubic import bicubic
from tests.clips import Clip, write_clip

OPTIONS = UpscaleOptions(scale=2, codec="ffv1")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "in.mp4", Clip(pts=range(0, 40 * 512, 512)))


@pytest.mark.parametrize("name", ["publishing", "owner", "lock", "job.json", "journal.jsonl", "piece.part"])
def test_nothing_is_written_through_a_link(clip: Path, tmp_path: Path, name: str) -> None:
    """Whoever made the folder first could have other files of the user's written over."""
    thesis, folder = tmp_path / "thesis.txt", tmp_path / "out.mkv.duovsr"
    thesis.write_text("mine")
    folder.mkdir()
    (folder / name).symlink_to(thesis)
    with pytest.raises(UsageError, match=f"would need a file named `.*{name}`"):
        bicubic().upscale_file(clip, tmp_path / "out.mkv", OPTIONS)
    assert thesis.read_text() == "mine"


def test_a_lock_that_cannot_be_opened(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(DuovsrError, match=r"cannot write in `.*out.mkv.duovsr`: Permission denied"):
        bicubic().upscale_file(clip, tmp_path / "out.mkv", OPTIONS)


def test_pieces_that_are_there_need_no_space(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The early refusal of work that cannot fit."""
    monkeypatch.setattr(files, "PIECE_FRAMES", 12)
    target, least = tmp_path / "out.mkv", 40 * 128 * 96 // 10
    with pytest.raises(Interrupted):
        bicubic().upscale_file(clip, target, OPTIONS, should_stop=lambda: True)
    assert (target.with_name("out.mkv.duovsr") / "piece_000000.mkv").stat().st_size > least
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=least - 1))
    with pytest.raises(NoSpaceError):
        bicubic().upscale_file(clip, target, OPTIONS)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=least))
    with pytest.raises(NoSpaceError):
        bicubic().upscale_file(clip, tmp_path / "other.mkv", OPTIONS)
    assert bicubic().upscale_file(clip, target, OPTIONS).reused > 0
