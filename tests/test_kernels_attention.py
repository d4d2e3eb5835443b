"""Window attention against a slow reference that looks at each query on its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from duovsr.kernels.attention import attention, window_starts
from duovsr.options import WindowConfig


def reference(q: Tensor, k: Tensor, v: Tensor, window: WindowConfig, shifted: bool) -> Tensor:
    B, T, H, W, heads, head_dim = q.shape
    out = torch.empty_like(q)
    for t in range(T):
        for y in range(H):
            for x in range(W):
                ys, xs = (
                    next((s, s + min(w, n)) for s, a, b in window_starts(n, w, shifted) if a <= p < b)
                    for p, n, w in ((y, H, window.height), (x, W, window.width))
                )
                keys = k[:, t : t + window.past + 1, slice(*ys), slice(*xs)].flatten(1, 3)
                values = v[:, t : t + window.past + 1, slice(*ys), slice(*xs)].flatten(1, 3)
                scores = torch.einsum("bhd,bnhd->bhn", q[:, t, y, x], keys) / head_dim**0.5
                out[:, t, y, x] = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), values)
    return out


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("T", "H", "W"), [(1, 4, 4), (3, 5, 7), (2, 3, 13), (1, 8, 9)])
@pytest.mark.parametrize("past", [0, 1, 2])
def test_windowed_equals_reference(T: int, H: int, W: int, past: int, shifted: bool) -> None:
    torch.manual_seed(0)
    window = WindowConfig(4, 4, past)
    q = torch.randn(2, T, H, W, 2, 8)
    k, v = torch.randn(2, 2, T + past, H, W, 2, 8)
    assert_close(attention(q, k, v, window, shifted=shifted), reference(q, k, v, window, shifted))


@pytest.mark.parametrize("window", [WindowConfig(4, 4, past=1), WindowConfig(4, 4, past=None), None])
def test_bfloat16_on_a_cpu_is_close_to_torchs_and_equal_in_any_batch(window: WindowConfig | None) -> None:
    """There a way of its own is taken where no gradient is wanted."""
    torch.manual_seed(0)
    past = 0 if window is None else window.past or 0
    q = torch.randn(1, 2, 7, 9, 2, 64).bfloat16()
    k, v = torch.randn(2, 1, 2 + past, 7, 9, 2, 64).bfloat16()
    exact = attention(q.double(), k.double(), v.double(), window)
    with torch.no_grad():
        result = attention(q, k, v, window)
        batch = attention(*(torch.cat([x, -x, x]) for x in (q, k, v)), window)
    torchs = attention(q.clone().requires_grad_(), k, v, window)
    errors, theirs = ((x.detach() - exact).square().mean().sqrt() for x in (result, torchs))
    assert errors < 2.5 * theirs
    assert torch.equal(batch[0], result[0]) and torch.equal(batch[2], result[0])


def test_window_of_the_whole_frame_equals_full_attention() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 5, 2, 8)
    assert_close(attention(q, k, v, WindowConfig(6, 5, past=0)), attention(q, k, v))
    q, k, v = torch.randn(3, 2, 3, 6, 5, 2, 8)
    assert_close(attention(q, k, v, WindowConfig(6, 5, past=None)), attention(q, k, v))


@pytest.mark.parametrize("shifted", [False, True])
def test_a_window_over_all_frames_sees_them_all_and_only_its_own_place(shifted: bool) -> None:
    """As with a past of all frames, which are put in front of a last one."""
    q, k, v = torch.randn(3, 2, 3, 7, 5, 2, 8)
    result = attention(q, k, v, WindowConfig(4, 4, past=None), shifted=shifted)
    for t in range(3):
        last = attention(q[:, t : t + 1], k, v, WindowConfig(4, 4, past=2), shifted=shifted)
        assert_close(result[:, t : t + 1], last)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("length", [1, 4, 7, 8, 9, 12, 45])
def test_owned_ranges_tile_the_axis_and_windows_stay_inside(length: int, shifted: bool) -> None:
    spans = window_starts(length, 8, shifted)
    assert [s[1] for s in spans] == [0, *(s[2] for s in spans[:-1])]
    assert spans[-1][2] == length
    for start, first, end in spans:
        assert 0 <= start <= first < end <= start + min(8, length) <= length


@pytest.mark.parametrize("shifted", [False, True])
def test_a_tile_at_twice_the_window_sees_the_windows_of_the_frame(shifted: bool) -> None:
    whole = {s for s in window_starts(64, 8, shifted) if s[1] >= 16 + 8}
    tile = {(a + 16, b + 16, c + 16) for a, b, c in window_starts(48, 8, shifted) if b >= 8}
    assert whole == tile


def test_indices_made_in_inference_mode_serve_training() -> None:
    q, k, v = torch.randn(3, 1, 1, 11, 10, 2, 8).unbind(0)
    window = WindowConfig(4, 4, past=0)
    with torch.inference_mode():
        attention(q, k, v, window)
    q.requires_grad_()
    attention(q, k, v, window).sum().backward()
    assert q.grad is not None
