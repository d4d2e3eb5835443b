"""HDR10's static metadata in the spellings of the encoders that write it."""

from __future__ import annotations

from duovsr.video.sidedata import HDRMetadata, MasteringDisplay


def x265_parameters(hdr: HDRMetadata) -> str:
    """As part of `x265-params`: whole numbers of 1/50000, and of 1/10000 cd/m2."""
    parameters = ["hdr10=1"]
    if hdr.mastering_display is not None:
        parameters.append(f"master-display={_display(hdr.mastering_display, 1, 1)}")
    if hdr.light_level is not None:
        parameters.append("max-cll={},{}".format(*hdr.light_level))
    return ":".join(parameters)


def svtav1_parameters(hdr: HDRMetadata) -> str:
    """As part of `svtav1-params`: decimal fractions, and cd/m2."""
    parameters = []
    if hdr.mastering_display is not None:
        parameters.append(f"mastering-display={_display(hdr.mastering_display, 50000, 10000)}")
    if hdr.light_level is not None:
        parameters.append("content-light={},{}".format(*hdr.light_level))
    return ":".join(parameters)


def _display(display: MasteringDisplay, chroma_unit: int, luminance_unit: int) -> str:
    points = (("G", display.green), ("B", display.blue), ("R", display.red), ("WP", display.white))
    colors = "".join(f"{name}({_number(x, chroma_unit)},{_number(y, chroma_unit)})" for name, (x, y) in points)
    most, least = (_number(value, luminance_unit) for value in (display.max_luminance, display.min_luminance))
    return f"{colors}L({most},{least})"


def _number(value: int, unit: int) -> str:
    return str(value) if unit == 1 else f"{value / unit:.6f}"
