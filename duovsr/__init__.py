"""duovsr: one-step diffusion video super-resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from duovsr.errors import DuovsrError
from duovsr.options import Progress, UpscaleOptions

if TYPE_CHECKING:
    from duovsr.engine.upscaler import Upscaler

__version__ = "0.1.0"
__all__ = ["DuovsrError", "Progress", "UpscaleOptions", "Upscaler", "__version__"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: only who asks for the engine pays.
    if name == "Upscaler":
        from duovsr.engine.upscaler import Upscaler

        return Upscaler
    raise AttributeError(name)
