"""Decoding on an NVIDIA GPU, of what comes out as the software decodes it, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import av
from av.codec.hwaccel import HWAccel

from duovsr.errors import UsageError
from duovsr.options import PIPE
from duovsr.video.container import main_video
from duovsr.video.images import is_sequence
from duovsr.video.info import VideoInfo, describe, first_picture
from duovsr.video.source import ClipSource, Source, open_source

_EXACT = ("h264", "hevc")  # their standards say what every bit of a picture is
_HINT = "leave out `--decoder`"


class NvdecSource(ClipSource):
    """The main video of a file, in the pixel format in which the software decodes it.

    What the standards leave open, as what a GPU makes of a picture that is cut at the left, is told by the first
    picture, which is decoded both ways. What fails after it is damage: nothing falls back to software. Raises
    `UsageError` for what is not decoded alike, for pipes and images, and on a machine that cannot decode so.
    """

    def __init__(self, path: Path, frame_rate: Fraction | None = None) -> None:
        if path == PIPE or is_sequence(path):
            raise UsageError(f"NVDEC decodes video files, which `{path}` is not", hint=_HINT)
        with closing(open_source(path, frame_rate)) as software:
            picture = first_picture(software, software.pictures())
            self._format = picture.format.name
            self._expected = _content(software, picture)
        super().__init__(path)
        self.close()
        if self.codec not in _EXACT or picture.width % 2 or picture.height % 2:
            raise self._refusal()
        try:
            self._container = av.open(
                str(path.absolute()),
                "r",
                options={"pattern_type": "none"},
                metadata_errors="surrogateescape",
                hwaccel=HWAccel("cuda", allow_software_fallback=False),
            )
        except (av.error.FFmpegError, RuntimeError) as error:  # the latter is PyAV's own
            reason = getattr(error, "strerror", None) or error
            hint = f"it needs an NVIDIA GPU and its driver; {_HINT}"
            raise UsageError(f"NVDEC does not open on this machine ({reason})", hint=hint) from error
        self._stream = main_video(self._container, path)

    def pictures(self) -> Iterator[av.VideoFrame]:
        decoded = super().pictures()  # with luma in one plane and chroma in another
        pictures = (picture.reformat(format=self._format) for picture in decoded)
        first = next(pictures, None)
        if first is None or _content(self, first) != self._expected:
            raise self._refusal()
        yield first
        yield from pictures

    def _refusal(self) -> UsageError:
        described = f"{self.codec}, {self._format}"
        return UsageError(f"NVDEC does not decode `{self.path}` as the software does ({described})", hint=_HINT)


def _content(source: Source, picture: av.VideoFrame) -> tuple[VideoInfo, bytes]:
    """All that is made of a first picture."""
    return describe(source, picture), picture.to_ndarray().tobytes()
