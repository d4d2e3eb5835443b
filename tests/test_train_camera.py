"""Moving cameras over stills, and windows of clips: what the pictures of a pool show."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from duovsr.train.pool import camera_move, camera_path, crop_clip, view


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_camera_that_stands_still_sees_a_crop() -> None:
    still = torch.rand(1, 3, 60, 70, generator=seeded())
    path = torch.tensor([[24.0 + 11, 24.0 + 5, 0.0, 1.0]]).expand(3, 4)
    seen = view(still, path, 48)
    assert_close(seen, still[..., 5 : 5 + 48, 11 : 11 + 48].expand(3, -1, -1, -1), rtol=0, atol=1e-4)
    moved = view(still, path + torch.tensor([[0.0] * 4, [1, 0, 0, 0], [0, 2, 0, 0]]), 48)
    assert_close(moved[1], still[0, :, 5 : 5 + 48, 12 : 12 + 48], rtol=0, atol=1e-4)
    assert_close(moved[2], still[0, :, 7 : 7 + 48, 11 : 11 + 48], rtol=0, atol=1e-4)


def test_a_camera_moves_smoothly_and_stays_in_the_picture() -> None:
    still = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16, generator=seeded()), (96, 128), mode="bicubic")
    for seed in range(5):
        window = camera_move(still.clamp(0, 1), 9, 48, 3.0, seeded(seed))
        steps = (window[1:] - window[:-1]).abs().mean((1, 2, 3))
        assert window.shape == (9, 3, 48, 48)
        assert steps.min() > 0 and steps.max() < 0.2
        centres = camera_path(96, 128, 9, 48, 3.0, seeded(seed))[:, :2]
        assert (centres > 20).all() and (centres < torch.tensor([108.0, 76.0])).all()


def test_a_camera_pans_up_to_its_speed() -> None:
    paths = [camera_path(2000, 2000, 9, 48, 20.0, seeded(seed))[:, :2] for seed in range(40)]
    speeds = sorted(float((path[-1] - path[0]).norm()) / 8 for path in paths)
    assert 15 < speeds[-1] < 21
    assert speeds[20] < 10  # slow ones are more
    assert speeds[0] < 1


def test_a_short_clip_runs_back_and_forth() -> None:
    clip = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 24, 24)
    shown = (crop_clip(clip, 8, 24, seeded())[:, 0, 0, 0] * 255).round().int().tolist()
    assert shown == [0, 1, 2, 1, 0, 1, 2, 1]
    assert crop_clip(clip[:1], 4, 24, seeded()).std() == 0


def test_windows_of_large_pictures_show_more_of_them() -> None:
    ramp = torch.linspace(0, 255, 480).round().byte().expand(2, 3, 240, 480)
    parts = [
        float(w[..., -1].mean() - w[..., 0].mean()) for w in (crop_clip(ramp, 2, 24, seeded(i)) for i in range(20))
    ]
    assert min(parts) > 0.9 * 23 / 479
    assert 2.5 * 23 / 479 < max(parts) < 1.1 * 80 / 479
