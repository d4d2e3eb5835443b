"""Folders of videos: what is found, and what its output is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from duovsr.engine.batch import Selection, find_items, is_batch, output_name
from duovsr.errors import UsageError
from tests.clips import touch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def found(folder: Path, target: Path, **selection: Any) -> dict[str, str]:
    items = find_items(folder, target, Selection(**selection))
    return {str(item.source.relative_to(folder)): str(item.target.relative_to(target)) for item in items}


@pytest.mark.parametrize(
    ("name", "suffix", "output"),
    [
        ("a.mp4", "", "a.mp4"),
        ("a.mov", "", "a.mov"),
        ("a.MP4", "", "a.MP4"),
        ("a.mkv", "", "a.mkv"),
        ("a.avi", "", "a.avi.mkv"),
        ("a.ts", "", "a.ts.mkv"),
        ("a.gif", "", "a.gif.mkv"),
        ("a.png", "", "a.png"),
        ("a.dpx", "", "a.dpx.png"),
        ("a.mp4", "_x4", "a_x4.mp4"),
        ("a.avi", "_x4", "a.avi_x4.mkv"),
        ("a.mp4", ".x4", "a.x4.mp4"),
        ("a.mp4", "_x4.mkv", "a.mp4_x4.mkv"),
        ("a.mkv", "_x4.mkv", "a_x4.mkv"),
        ("a.avi", ".mp4", "a.avi.mp4"),
        ("a.b.mp4", "", "a.b.mp4"),
    ],
)
def test_outputs_are_called_after_their_inputs(name: str, suffix: str, output: str) -> None:
    assert output_name(name, suffix) == output


def test_videos_are_found_in_natural_order(folder: Path, tmp_path: Path) -> None:
    touch(folder, "clip10.mp4", "clip9.mp4", "clip9.MOV", "cover.jpg", "notes.txt", ".hidden.mp4", "sub/a.mp4")
    touch(folder, "clip9.mp4.duovsr/piece_000000.mkv", ".trash/b.mp4")
    expected = {"clip9.MOV": "clip9.MOV", "clip9.mp4": "clip9.mp4", "clip10.mp4": "clip10.mp4"}
    assert list(found(folder, tmp_path / "out").items()) == list(expected.items())
    assert found(folder, tmp_path / "out", recursive=True) == expected | {"sub/a.mp4": "sub/a.mp4"}


def test_a_pattern_narrows_the_search_and_reaches_images(folder: Path, tmp_path: Path) -> None:
    touch(folder, "a1.mp4", "b1.mp4", "a1.png", "a1.txt", "sub/a2.mp4")
    assert list(found(folder, tmp_path / "out", pattern="a*")) == ["a1.mp4", "a1.png"]
    assert list(found(folder, tmp_path / "out", pattern="a*.mp4", recursive=True)) == ["a1.mp4", "sub/a2.mp4"]


def test_the_target_folder_is_no_input(folder: Path) -> None:
    touch(folder, "a.mp4", "out/b.mp4", "other/c.mp4")
    assert list(found(folder, folder / "out", recursive=True)) == ["a.mp4", "other/c.mp4"]


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    """Not within the source, where they may go in a circle, and not to the outputs."""
    touch(folder, "b/b.mp4")
    touch(tmp_path, "disk/clips/c.mp4", "disk/d.mp4", "out/old/o.mp4")
    links = {"a": "in/b", "circle": "in", "clips": "disk/clips", "disk": "disk", "up": ".", "old": "out/old"}
    for name, place in links.items():
        (folder / name).symlink_to(tmp_path / place)
    names = ["b/b.mp4", "clips/c.mp4", "disk/d.mp4"]
    assert list(found(folder, tmp_path / "out", recursive=True)) == names
    assert list(found(folder, tmp_path / "new", recursive=True)) == [*names, "old/o.mp4"]


def test_a_link_to_itself_is_one_bad_file(folder: Path, tmp_path: Path) -> None:
    touch(folder, "a.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    assert list(found(folder, tmp_path / "out")) == ["a.mp4", "loop.mp4"]


def test_same_names_do_not_collide(folder: Path, tmp_path: Path) -> None:
    touch(folder, "a.mp4", "a.mov", "a.avi", "a.mkv", "a.wmv")
    outputs = list(found(folder, tmp_path / "out").values())
    assert sorted(outputs) == ["a.avi.mkv", "a.mkv", "a.mov", "a.mp4", "a.wmv.mkv"]
    touch(folder, "a.avi.mkv")
    with pytest.raises(UsageError, match=r"a\.avi.* and .*a\.avi\.mkv.* would both become .*a\.avi\.mkv"):
        find_items(folder, tmp_path / "out", Selection())


def test_an_input_is_no_target(tmp_path: Path) -> None:
    touch(tmp_path, "in/in/a.mp4", "in/a.mp4")
    with pytest.raises(UsageError, match="is an input"):
        find_items(tmp_path / "in", tmp_path, Selection(recursive=True))


def test_what_is_one_clip(folder: Path, tmp_path: Path) -> None:
    touch(folder, "1.png", "2.png")
    assert not is_batch(folder, Selection())
    assert is_batch(folder, Selection(pattern="*.png"))
    assert is_batch(folder, Selection(recursive=True))
    assert not is_batch(folder / "1.png", Selection())
    touch(folder, "a.mp4")
    assert is_batch(folder, Selection())
