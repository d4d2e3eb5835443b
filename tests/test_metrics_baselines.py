"""The recorded bicubic scores of the evaluation set, reproduced from its files."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import av
import pytest
from clips import Clip, write_clip

from duovsr.metrics.evaluate import evaluate

SHARED = Path(os.environ.get("DUOVSR_SHARED", Path(__file__).parents[2] / "shared")) / "data"
NIQE_PARAMETERS = SHARED / "metrics" / "niqe_pris_params.npz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SHARED / "eval" / "gt").is_dir() or not NIQE_PARAMETERS.is_file(),
        reason=f"no evaluation set under `{SHARED}`: set DUOVSR_SHARED",
    ),
]

# of data/BASELINES.md, rows "bicubic" and "the truth itself", with the tolerance of each metric
RECORDED = {
    "bi": {"psnr_y": 26.57, "ssim_y": 0.734, "vmaf": 51.6, "niqe": 7.43, "ewarp_dis": 0.600},
    "real": {"psnr_y": 24.41, "ssim_y": 0.627, "vmaf": 20.3, "niqe": 8.44, "ewarp_dis": 0.403},
    "gt": {"niqe": 3.98, "ewarp_dis": 0.794},
}
TOLERANCE = {
    "psnr_y": {"abs": 0.02},
    "ssim_y": {"abs": 0.002},
    "vmaf": {"abs": 0.3},
    "niqe": {"abs": 0.05},
    "ewarp_dis": {"rel": 0.02},
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_scores_are_reproduced(name: str, tmp_path: Path) -> None:
    truth = SHARED / "eval" / "gt"
    output = truth if name == "gt" else bicubic_x4(SHARED / "eval" / name, tmp_path)
    recorded = RECORDED[name]
    report = evaluate(output, ref=truth, niqe_parameters=NIQE_PARAMETERS, metrics=recorded.keys())
    assert report.skipped == {}
    for metric, expected in recorded.items():
        assert report.means[metric] == pytest.approx(expected, **TOLERANCE[metric]), metric


def bicubic_x4(source: Path, target: Path) -> Path:
    """Writes the folder's clips at four times their size by OpenCV's bicubic (a = -0.75), losslessly.

    The record's LQ frames were made RGB by FFmpeg's scaler at its defaults, which is worth 0.05 dB less on `real`
    (4:2:0) than `VideoReader`'s exact conversion.
    """
    cv2 = pytest.importorskip("cv2", reason="the recorded baseline is OpenCV's bicubic")
    for path in sorted(source.glob("*.mp4")):
        with av.open(str(path)) as container:
            lq = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        frames = [cv2.resize(pixels, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) for pixels in lq]
        height, width, _ = frames[0].shape
        clip = Clip(range(0, 512 * len(frames), 512), size=(width, height), codec="ffv1", pix_fmt="bgr0")
        write_clip(target / f"{path.stem}.mkv", replace(clip, pictures=frames))
    return target
