"""What `evaluate` returns: plain values, ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from duovsr.errors import Remark

ReferenceKind = Literal["ref", "lq"]


@dataclass(frozen=True)
class ClipScores:
    """One clip. `scores` are means over its frames; `skipped` says of the metrics without a score why."""

    name: str
    output: str
    reference: str
    width: int
    height: int
    frames: int
    scores: dict[str, float]
    skipped: dict[str, str]
    notices: tuple[str, ...]  # what reading the two files had to say, such as damage

    @property
    def warnings(self) -> tuple[str, ...]:
        """The notices of what is not as it was in the files."""
        return tuple(notice for notice in self.notices if not isinstance(notice, Remark))


@dataclass(frozen=True)
class Report:
    """All clips that could be measured, and the `means` over them of every metric that has a score on each; `skipped`
    has the other metrics, `failed` the other clips, with the reasons.

    `conventions` says how each metric is defined here; `versions` names the packages that computed; `flow_source` is
    where the motion of E_warp came from; `niqe_parameters_sha256` identifies NIQE's parameter file.
    """

    kind: ReferenceKind
    clips: tuple[ClipScores, ...]
    means: dict[str, float]
    skipped: dict[str, str]
    failed: dict[str, str]
    conventions: dict[str, str]
    versions: dict[str, str]
    flow_source: str | None
    niqe_parameters_sha256: str | None

    def to_json(self) -> dict[str, Any]:
        """Everything as dicts, lists and scalars for `json.dumps`; all numbers are finite and unrounded."""
        return asdict(self)
