"""Frames to the device and back. On CUDA they go as integers, through page-locked memory, on streams of their own: the
copies of one chunk run beside the computation of another, and nothing waits for them but who needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

_ON_DEVICE = {"uint8": torch.uint8, "uint16": torch.int16, "float32": torch.float32}

Arriving = Callable[[], np.ndarray]  # waits until it is there


@cache
def transfer_to(device: torch.device) -> Transfer:
    """One for all: torch keeps what was freed on a stream for the next on that stream."""
    return CudaTransfer(device) if device.type == "cuda" else HostTransfer(device)


class HostTransfer:
    """To a device whose copies the host waits for, or which is the host itself."""

    ahead = False  # whether to launch a chunk before the results of the one before are fetched

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def upload(self, frames: Sequence[np.ndarray]) -> Tensor:
        """T frames (H, W, 3) -> (T, H, W, 3) on the device; uint16, which torch hardly has, as int16 of its bits."""
        return torch.from_numpy(_signed(np.stack(frames))).to(self._device)

    def download(self, pixels: Tensor) -> Arriving:
        """What makes an array, all its own, of a tensor."""
        array = pixels.cpu().numpy()
        return lambda: array


class CudaTransfer:
    """Copies through page-locked memory, on two streams.

    torch gives memory to nobody else before its copies have ended: on the host of its own accord, on the device if
    `record_stream` tells it of the stream that did not allocate it.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def upload(self, frames: Sequence[np.ndarray]) -> Tensor:
        """See `HostTransfer`. What is computed from here on waits for it, and what is under way does not."""
        dtype = _ON_DEVICE[frames[0].dtype.name]
        locked = torch.empty(len(frames), *frames[0].shape, dtype=dtype, pin_memory=True)
        np.stack([_signed(frame) for frame in frames], out=locked.numpy())
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._up):
            pixels = locked.to(self._device, non_blocking=True)
        computing.wait_stream(self._up)
        pixels.record_stream(computing)
        return pixels

    def download(self, pixels: Tensor) -> Arriving:
        """See `HostTransfer`. The copy begins when what was launched so far is done. The array is a copy once more:
        its owner may keep it for as long as he likes, and page-locked memory is scarce."""
        locked = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
        self._down.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._down):
            locked.copy_(pixels, non_blocking=True)
            arrived = self._down.record_event()
        pixels.record_stream(self._down)

        def wait() -> np.ndarray:
            arrived.synchronize()
            return locked.numpy().copy()

        return wait


Transfer = HostTransfer | CudaTransfer


def _signed(frames: np.ndarray) -> np.ndarray:
    return frames.view(np.int16) if frames.dtype == np.uint16 else frames
