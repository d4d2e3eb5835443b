"""The one training loop: seeded steps, cosine decay, EMA, JSONL metrics, atomic checkpoints, exact resume.

A stage hands over its modules, optimisers and a function that performs step `n`. Before every step the random state
is set from (seed, step), and batches are a function of the step, so that a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from duovsr.errors import TrainError, UsageError
from duovsr.train.runs import FINAL

StepFunction = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class LoopConfig:
    """Length and habits of a run. The learning rate falls to zero on a cosine after `warmup` steps."""

    steps: int
    seed: int = 0
    warmup: int = 100
    ema: float = 0.999
    clip: float = 1.0
    log_every: int = 20
    save_every: int = 250
    threads: int | None = None


def learning_rate_factor(step: int, config: LoopConfig) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


class Ema:
    """Exponential moving average of a module's parameters and buffers, kept beside it in their own dtype."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.values[name].lerp_(value.to(self.values[name].dtype), 1 - decay)


def optimizer_step(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> Tensor:
    """Backward, clip, step. Returns the gradient's norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return norm


def run_loop(
    folder: Path,
    config: LoopConfig,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    step_function: StepFunction,
    settings: object,
    *,
    ema_of: tuple[str, ...],
    carried: Mapping[str, nn.Module] | None = None,
) -> None:
    """Run to `config.steps`, resuming from `folder/state.pt` if it is there.

    Leaves `folder/final.pt`: the EMA weights of `ema_of`, and `carried` as they are, so that the next stage needs one
    folder only.

    Raises TrainError at a non-finite loss, naming the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.threads:
        torch.set_num_threads(config.threads)
    emas = {name: Ema(modules[name], config.ema) for name in ema_of}
    base_rates = {name: [group["lr"] for group in o.param_groups] for name, o in optimizers.items()}
    _check_settings(folder, settings)
    start = _resume(folder / "state.pt", modules, optimizers, emas)
    began = time.monotonic()
    with (folder / "metrics.jsonl").open("a") as log:
        bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc=folder.name, disable=None)
        for step in bar:
            torch.manual_seed(config.seed * 1_000_003 + step)
            for name, optimizer in optimizers.items():
                for group, rate in zip(optimizer.param_groups, base_rates[name], strict=True):
                    group["lr"] = rate * learning_rate_factor(step, config)
            losses = {name: float(value) for name, value in step_function(step).items()}
            if not all(math.isfinite(value) for value in losses.values()):
                raise TrainError(f"loss is not finite at step {step}: {losses}")
            for name, ema in emas.items():
                ema.update(modules[name], step)
            if step % config.log_every == 0 or step == config.steps - 1:
                record = {"step": step, "seconds": round(time.monotonic() - began, 1), **losses}
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()})
            if (step + 1) % config.save_every == 0 or step == config.steps - 1:
                _save(folder / "state.pt", step + 1, modules, optimizers, emas)
    final = {name: module.state_dict() for name, module in (carried or {}).items()}
    _atomic_save({**final, **{name: ema.values for name, ema in emas.items()}}, folder / FINAL)


def _check_settings(folder: Path, settings: object) -> None:
    """Note a new run's settings; refuse to resume a run that had others."""
    path = folder / "settings.json"
    described = json.loads(json.dumps(_describe(settings), default=str))
    if not (folder / "state.pt").exists():
        path.write_text(json.dumps(described, indent=1))
        return
    noted = json.loads(path.read_text())
    different = sorted(key for key in described["settings"] if described["settings"][key] != noted["settings"].get(key))
    if different or described["stage"] != noted["stage"]:
        raise UsageError(
            f"run `{folder}` was started with other settings: {', '.join(different) or noted['stage']}",
            hint="resume with the same command, or choose another `--out`",
        )


def _resume(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    emas: Mapping[str, Ema],
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name], strict=True)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, ema in emas.items():
        ema.values = state["emas"][name]
    return int(state["step"])


def _save(
    path: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    emas: Mapping[str, Ema],
) -> None:
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "emas": {name: ema.values for name, ema in emas.items()},
    }
    _atomic_save(state, path)


def _atomic_save(state: object, path: Path) -> None:
    partial = path.with_suffix(".part")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _describe(settings: object) -> dict[str, Any]:
    fields = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else {}
    stage = type(settings).__name__
    return {
        "stage": stage,
        "settings": fields,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.processor(),
    }
