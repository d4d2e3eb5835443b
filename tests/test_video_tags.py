"""What files say about themselves and their streams is kept where the container holds it, and said where not."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from av.stream import Disposition

from duovsr.errors import Remark
from tests.clips import Clip, edited, write_clip
from tests.pieces import copy_beside

APPLE = {
    "com.apple.quicktime.make": "Apple",
    "com.apple.quicktime.software": "17.1",
    "com.apple.quicktime.location.ISO6709": "+48.1000+011.5000/",
    "com.apple.quicktime.creationdate": "2024-01-02T03:04:05+0200",
    "title": "A clip",
}


def copied(source: Path, target: Path, options: dict[str, str] | None = None) -> tuple[dict[str, str], list[str]]:
    """The metadata of a file with all that `source` has beside its picture, and what was said."""
    notices = copy_beside(source, target, options).notices
    with av.open(str(target)) as container:
        return {key.lower(): value for key, value in container.metadata.items()}, notices


def test_keys_that_the_container_does_not_hold_are_said(tmp_path: Path) -> None:
    tags = {"title": "Ein Titel", "artist": "me", "FOO": "bar", "DATE_RECORDED": "2020", "timecode": "no timecode"}
    source = write_clip(tmp_path / "in.mkv", Clip(metadata=tags))
    for suffix, name in ((".mp4", "mp4"), (".mov", "mov")):
        kept, notices = copied(source, tmp_path / f"out{suffix}")
        assert (kept["title"], kept["artist"]) == ("Ein Titel", "me")
        assert f"metadata is not kept, {name} does not hold it: DATE_RECORDED, FOO" in notices
        assert len(notices) == 2 and not any(isinstance(notice, Remark) for notice in notices)  # and the timecode
    for suffix in (".mkv", ".webm"):
        kept, notices = copied(source, tmp_path / f"out{suffix}")
        assert (kept["foo"], kept["date_recorded"]) == ("bar", "2020")
        assert notices == []


def tagged(source: Path, path: Path, *tags: dict[str, str]) -> Path:
    """A copy of `source` whose streams have such tags."""

    def put(out: object, copies: dict[int, av.stream.Stream]) -> None:
        for copy, metadata in zip(copies.values(), tags, strict=False):
            copy.metadata.update(metadata)

    return edited(source, path, put)


def tags_of_streams(path: Path) -> list[dict[str, str]]:
    with av.open(str(path)) as container:
        return [{key.lower(): value for key, value in stream.metadata.items()} for stream in container.streams]


def test_tags_of_streams_are_kept_or_said(tmp_path: Path) -> None:
    statistics = {"BPS-eng": "128000", "NUMBER_OF_FRAMES": "48", "_STATISTICS_TAGS": "BPS"}
    tags = (
        {"title": "The picture", "language": "jpn", "handler_name": "A handler", "SOURCE_ID": "001011"},
        {"title": "Commentary", "language": "deu", "FOO": "bar", "SOURCE_ID": "001100", **statistics},
        {"title": "Quenya", "language": "qya"},
    )
    source = tagged(write_clip(tmp_path / "clip.mkv", Clip(audio=["aac"] * 2)), tmp_path / "in.mkv", *tags)
    lost = "metadata of streams is not kept, {} does not hold it: FOO (#1), SOURCE_ID (#0 #1)"
    for suffix, name, languages in ((".mp4", "mp4", ["jpn", "deu", "qya"]), (".mov", "mov", ["jpn", "ger", None])):
        _, notices = copied(source, tmp_path / f"out{suffix}")
        found = tags_of_streams(tmp_path / f"out{suffix}")
        assert [stream["name"] for stream in found] == ["The picture", "Commentary", "Quenya"]
        assert [stream.get("language") for stream in found] == languages
        assert found[0]["handler_name"] == "A handler"
        assert notices == [lost.format(name) + (", language (#2)" if name == "mov" else "")]
        assert not isinstance(notices[0], Remark)
        again = tmp_path / f"again{suffix}"
        assert copied(tmp_path / f"out{suffix}", again)[1] == []
        assert [stream["name"] for stream in tags_of_streams(again)] == ["The picture", "Commentary", "Quenya"]
        back = tmp_path / "back.mkv"
        assert copied(tmp_path / f"out{suffix}", back)[1] == []
        assert [stream["title"] for stream in tags_of_streams(back)] == ["The picture", "Commentary", "Quenya"]
    assert copied(source, tmp_path / "out.mkv")[1] == []
    for found, given in zip(tags_of_streams(tmp_path / "out.mkv"), tags, strict=True):
        kept = {key.lower(): value for key, value in given.items()}
        assert found == found | kept


def test_a_date_of_the_file_is_that_of_its_streams(tmp_path: Path) -> None:
    date = {"creation_time": "2020-01-02T03:04:05.000000Z"}
    source = write_clip(tmp_path / "in.mp4", Clip(metadata=date, audio=["aac"]))
    assert [stream.get("creation_time") for stream in tags_of_streams(source)] == [date["creation_time"]] * 2
    assert copied(source, tmp_path / "out.mp4")[1] == []
    data = bytearray(source.read_bytes())
    date_of_file = data.index(b"mvhd") + 8
    data[date_of_file : date_of_file + 4] = bytes(4)
    source.write_bytes(data)
    assert copied(source, tmp_path / "undated.mp4")[1] == [
        "metadata of streams is not kept, mp4 does not hold it: creation_time (#0 #1)"
    ]


def test_marks_of_the_sources_picture_do_not_stay(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv")
    source = tagged(clip, tmp_path / "in.mkv", {"alpha_mode": "1", "rotate": "90", "BPS": "1"})
    assert copied(source, tmp_path / "out.mkv")[1] == []
    assert not {"alpha_mode", "rotate", "bps"} & set(tags_of_streams(tmp_path / "out.mkv")[0])


def test_the_muxer_is_asked_with_its_options(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(metadata={"FOO": "bar"}))
    kept, notices = copied(source, tmp_path / "out.mp4", {"movflags": "use_metadata_tags"})
    assert kept["foo"] == "bar"
    assert notices == []


def test_what_a_camera_says_is_kept_under_common_names(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mov", Clip(metadata=APPLE, muxer={"movflags": "use_metadata_tags"}))
    kept, notices = copied(source, tmp_path / "out.mov")
    assert (kept["make"], kept["title"]) == ("Apple", "A clip")
    assert (kept["location"], kept["date"]) == ("+48.1000+011.5000/", "2024-01-02T03:04:05+0200")
    assert notices == []
    kept, notices = copied(source, tmp_path / "out.mp4")
    assert (kept["location"], kept["date"]) == ("+48.1000+011.5000/", "2024-01-02T03:04:05+0200")
    assert notices == ["metadata is not kept, mp4 does not hold it: make"]
    kept, notices = copied(source, tmp_path / "out.mkv")
    assert kept["com.apple.quicktime.make"] == "Apple"
    assert notices == []


@pytest.mark.parametrize(
    ("place", "is_rounded"), [("+48.1371+011.5755/", False), ("+48.137154+011.575490+519.123/", True)]
)
def test_a_rounded_location_is_said(tmp_path: Path, place: str, is_rounded: bool) -> None:
    source = write_clip(tmp_path / "in.mkv", Clip(metadata={"location": place}))
    kept, notices = copied(source, tmp_path / "out.mp4")
    assert kept["location"].startswith("+48.1371+011.5755")
    assert notices == (["the location is rounded to about 2 m: mp4 does so"] if is_rounded else [])
    assert all(isinstance(notice, Remark) for notice in notices)
    for suffix in (".mov", ".mkv"):
        kept, notices = copied(source, tmp_path / f"out{suffix}")
        assert (kept["location"], notices) == (place, [])


def test_a_text_in_a_second_language_is_said(tmp_path: Path) -> None:
    tags = {"title": "A clip", "title-ger": "Ein Stück", "comment": "same", "comment-eng": "same"}
    source = write_clip(tmp_path / "clip.mkv", Clip(metadata=tags, audio=["aac"]))
    for suffix, name in ((".mp4", "mp4"), (".mov", "mov")):
        kept, notices = copied(source, tmp_path / f"out{suffix}")
        assert (kept["title"], kept["comment"]) == ("A clip", "same")
        assert notices == [f"metadata is not kept, {name} does not hold it: TITLE-ger"]
    kept, notices = copied(source, tmp_path / "out.mkv")
    assert (kept["title"], kept["title-ger"], notices) == ("A clip", "Ein Stück", [])
    source = tagged(source, tmp_path / "in.mkv", {}, {"title": "Sound", "title-ger": "Ton"})
    assert copied(source, tmp_path / "streams.mp4")[1] == [
        "metadata of streams is not kept, mp4 does not hold it: TITLE-ger (#1)"
    ]


def test_marks_of_the_picture_are_kept_or_said(tmp_path: Path) -> None:
    def put(out: object, copies: dict[int, av.stream.Stream]) -> None:
        copies[0].disposition = Disposition.original

    source = edited(write_clip(tmp_path / "clip.mkv"), tmp_path / "in.mkv", put)
    assert copied(source, tmp_path / "out.mkv")[1] == []
    for suffix, name in ((".mp4", "mp4"), (".mov", "mov")):
        assert copied(source, tmp_path / f"out{suffix}")[1] == [
            f"video stream #0 (h264) is no longer marked `original`: {name} does not hold it"
        ]


def test_one_mark_of_mp4_is_two_names(tmp_path: Path) -> None:
    """`captions` are what `hearing_impaired` says already."""

    def put(out: object, copies: dict[int, av.stream.Stream]) -> None:
        copies[1].disposition = Disposition.hearing_impaired

    source = edited(write_clip(tmp_path / "clip.mkv", Clip(audio=["aac"])), tmp_path / "in.mp4", put)
    with av.open(str(source)) as container:
        assert Disposition.captions & container.streams.audio[0].disposition
    assert copied(source, tmp_path / "out.mkv")[1] == []
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert Disposition.hearing_impaired & container.streams.audio[0].disposition


@pytest.mark.parametrize(
    ("suffix", "lost"),
    [
        (".mkv", set()),
        (".mp4", {"original"}),
        (".webm", {"comment", "hearing_impaired", "visual_impaired", "dub", "original"}),
        (".mov", {"comment", "forced", "hearing_impaired", "visual_impaired", "dub", "original"}),
    ],
)
def test_marks_are_kept_or_said(tmp_path: Path, suffix: str, lost: set[str]) -> None:
    codec = "libopus" if suffix == ".webm" else "aac"
    clip = write_clip(tmp_path / "clip.mkv", Clip(audio=[codec] * 2))
    for mark in ("comment", "forced", "hearing_impaired", "visual_impaired", "dub", "original"):

        def put(out: object, copies: dict[int, av.stream.Stream], mark: str = mark) -> None:
            copies[2].disposition = Disposition[mark]

        target = tmp_path / f"{mark}{suffix}"
        _, notices = copied(edited(clip, tmp_path / "in.mkv", put), target)
        with av.open(str(target)) as container:
            assert bool(container.streams.audio[1].disposition & Disposition[mark]) == (mark not in lost)
        name = {".mkv": "matroska"}.get(suffix, suffix[1:])
        stream = f"audio stream #2 ({codec.removeprefix('lib')})"
        assert notices == ([f"{stream} is no longer marked `{mark}`: {name} does not hold it"] if mark in lost else [])


def test_telemetry_is_said_and_a_chapter_track_is_not(tmp_path: Path) -> None:
    source = write_clip(tmp_path / "in.mp4", Clip(chapters=[(0, 200, "One"), (200, 400, "Two")]))
    assert copied(source, tmp_path / "out.mp4")[1] == []
    data = source.read_bytes().replace(b"chap", b"cdsc").replace(b"chpl", b"free")  # the track is no chapter track
    entry = data.find(b"text", data.rfind(b"stsd"))
    kind = data.rfind(b"text", 0, entry)
    data = data[:kind] + b"meta" + data[kind + 4 : entry] + b"gpmd" + data[entry + 4 :]
    source.write_bytes(data)
    for suffix in (".mp4", ".mov", ".mkv"):
        assert copied(source, tmp_path / f"out{suffix}")[1] == ["data stream #1 (bin_data) is not kept"]
