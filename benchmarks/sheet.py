"""Before and after crops of the sample clip: `python benchmarks/picture.py RESULT.mp4` writes `results/sample.png`.

Left bicubic, right duovsr, at 100 %. (Needs Pillow.)
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from duovsr.video.reader import VideoReader

HERE = Path(__file__).parent
FRAME = 30
CROP = (420, 300)  # width and height in output pixels
CORNERS = ((60, 60), (700, 330))


def frame_of(path: Path, index: int) -> np.ndarray:
    with VideoReader(path) as reader:
        return next(islice(iter(reader), index, None)).pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="the sample clip, upscaled x4")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "sample.png")
    arguments = parser.parse_args()
    after = Image.fromarray(frame_of(arguments.result, FRAME))
    before = Image.fromarray(frame_of(HERE / "sample.mp4", FRAME)).resize(after.size, Image.Resampling.BICUBIC)
    width, height = CROP
    sheet = Image.new("RGB", (2 * width + 4, len(CORNERS) * (height + 4) - 4), "white")
    for row, (x, y) in enumerate(CORNERS):
        for column, picture in enumerate((before, after)):
            crop = picture.crop((x, y, x + width, y + height))
            sheet.paste(crop, (column * (width + 4), row * (height + 4)))
    sheet.save(arguments.out)


if __name__ == "__main__":
    main()
