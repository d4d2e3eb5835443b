"""The one training loop: updates of micro-batches, schedules, EMA, metrics, validation, exact resume.

Every random number is a function of (seed, step, part, sample), see `draws`: a resumed run repeats an uninterrupted
one, and a job of many processes one of a single process. Progress is counted in steps; nothing else is position.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from tqdm import tqdm

from duovsr.errors import Interrupted, TrainError
from duovsr.train.checkpoint import Checkpoints
from duovsr.train.distributed import World, any_rank, full, local, mean_over_ranks, wait_for_all
from duovsr.train.draws import Draws
from duovsr.train.journal import Journal
from duovsr.train.options import StageConfig
from duovsr.train.runs import BEST, FINAL, save_atomically

Metrics = dict[str, Tensor]
StepFunction = Callable[[int], Metrics]
Scores = dict[str, float]


class Ema:
    """Exponential moving average of a module's parameters and buffers, sharded as the module is."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.module = module
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        now = self.module.state_dict()
        torch._foreach_lerp_([local(v) for v in self.values.values()], [local(now[n]) for n in self.values], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        now = self.module.state_dict()
        for name, value in self.values.items():
            mine, theirs = local(value), local(now[name])
            kept = theirs.clone()
            theirs.copy_(mine)
            mine.copy_(kept)


def micro_batch(config: StageConfig, processes: int) -> int:
    """Samples that each process takes at a time. Raises TrainError where the batch does not divide."""
    parts = processes * config.accumulate
    if config.batch % parts:
        raise TrainError(
            f"batch {config.batch} does not divide by {processes} processes times accumulate={config.accumulate}",
            hint=f"use a multiple of {parts}",
        )
    return config.batch // parts


@dataclass
class Run:
    """A stage under way: its settings, its place among processes, and how its networks are updated."""

    out: Path
    config: StageConfig
    world: World

    @property
    def device(self) -> torch.device:
        return self.world.device

    def autocast(self) -> torch.autocast:
        enabled = self.config.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def adam(self, module: nn.Module, rate: float) -> torch.optim.AdamW:
        config = self.config
        betas = (config.beta1, config.beta2)
        return torch.optim.AdamW(module.parameters(), rate, betas, weight_decay=config.weight_decay)

    def micro_batches(self, step: int, part: int = 0) -> Iterator[Draws]:
        """This rank's share of the samples of update `part` of a step."""
        config, world = self.config, self.world
        size = micro_batch(config, world.size)
        for i in range(config.accumulate):
            start = (i * world.size + world.rank) * size
            seed = f"{type(config).__name__}/{config.seed}"  # stages do not see each other's crops and noise again
            yield Draws.of(range(start, start + size), seed=seed, step=step, part=part, device=self.device)

    def update(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        loss_of: Callable[[Draws], tuple[Tensor, Metrics]],
        step: int,
        part: int = 0,
    ) -> Metrics:
        """One step of each optimiser on the mean loss over the batch; the mean of what `loss_of` notes.

        Raises TrainError, and steps no more, where a gradient is not finite.
        """
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums: Metrics = {}
        for draws in self.micro_batches(step, part):
            loss, noted = loss_of(draws)
            (loss / self.config.accumulate).backward()
            for name, value in noted.items():
                sums[name] = sums.get(name, 0) + value.detach().float() / self.config.accumulate
        norms = [_clip(optimizer, self.config.clip) for optimizer in optimizers]
        if not all(math.isfinite(norm.item()) for norm in norms):
            described = ", ".join(f"{name} {value.item():.4g}" for name, value in sums.items())
            raise TrainError(f"gradient is not finite at step {step} ({described})", hint="lower the learning rate")
        for optimizer in optimizers:
            optimizer.step()
        return {**sums, "grad_norm": norms[0]}


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Clip the gradients of one optimiser; their norm before that."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return full(torch.nn.utils.clip_grad_norm_(parameters, limit)).detach()


@dataclass
class Trained:
    """What a stage trains and leaves. `modules`: saved in checkpoints. `averaged`: those whose EMA the stage leaves.
    `carried`: frozen modules that later stages need. `validate` returns scores of the averaged weights, of which
    `score` is to be lowered; it may write pictures."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    averaged: tuple[str, ...]
    carried: dict[str, nn.Module] = field(default_factory=dict)
    validate: Callable[[int], Scores] | None = None
    total: int | None = None  # steps in all, where not `config.steps`
    # Steps after which the learning rate's schedule and the average start again, for another task: only of the last
    # period may weights be the best ones, or patience end.
    period: int | None = None


def learning_rate_factor(step: int, total: int, config: StageConfig) -> float:
    """Linear warm-up, then a cosine to zero at `total` or a constant."""
    warmup = min(config.warmup, total // 10)  # a round of 60 steps would end before a warm-up of 100
    warm = min(1.0, (step + 1) / max(1, warmup))
    return warm if config.schedule == "constant" else warm * 0.5 * (1 + math.cos(math.pi * step / total))


def run_loop(run: Run, trained: Trained, step_function: StepFunction) -> None:
    """Run `step_function` to the end, resuming where the newest checkpoint of `run.out` stands.

    Leaves `final.pt`: the averaged weights and the carried ones, so that the next stage needs one folder only; with
    validation also `best.pt`. With `final.pt` a run is over, whether its checkpoints are still there or not.
    Raises Interrupted after a signal, with the state saved.
    """
    config, world = run.config, run.world
    total = trained.total or config.steps
    root = nn.ModuleDict(trained.modules)
    optimizers = list(trained.optimizers.values())
    emas = {name: Ema(trained.modules[name], config.ema) for name in trained.averaged}
    base_rates = [[group["lr"] for group in o.param_groups] for o in optimizers]
    _initialise(root, optimizers)
    position = _Position()
    with Checkpoints(run.out / "checkpoints", config.keep, world) as checkpoints:
        if checkpoints.latest() is None and (run.out / FINAL).exists():
            return  # finished, by the same settings: only the checkpoints were removed
        start = _resume(checkpoints, root, optimizers, emas, position)
        if position.exhausted(config.patience):
            start = total
        with Journal(run.out, start, world.first) as journal, _signals() as stop:
            for step in _bar(run, start, total):
                period = trained.period or total
                _set_rates(optimizers, base_rates, learning_rate_factor(step % period, period, config))
                metrics = step_function(step)
                for ema in emas.values():
                    ema.update(step % period)
                checkpoints.publish()
                done = step + 1
                if step % config.log_every == 0 or done == total:
                    journal.log(step, {name: mean_over_ranks(v, world).item() for name, v in metrics.items()})
                if trained.validate is not None and (done % config.validate_every == 0 or done == total):
                    _validate(run, trained, emas, position, journal, done, first=total - period)
                stopping = any_rank(stop.is_set(), world)
                exhausted = position.exhausted(config.patience)
                if stopping or exhausted or done % config.save_every == 0 or done == total:
                    checkpoints.save(_state(root, optimizers, emas, position, done), done)
                if stopping:
                    checkpoints.wait()
                    code = 130 if stop.number == signal.SIGINT else 143
                    hint = "run the same command to go on"
                    raise Interrupted(f"interrupted at step {done} of {total}; saved", hint=hint, exit_code=code)
                if exhausted:
                    break
    save_atomically(_left(trained, emas), run.out / FINAL, world)
    wait_for_all(world)  # the next stage reads it


def _bar(run: Run, start: int, total: int) -> Iterable[int]:
    quiet = None if run.world.first else True  # None: where there is no terminal
    return tqdm(range(start, total), initial=start, total=total, desc=run.out.name, disable=quiet)


def _set_rates(optimizers: list[torch.optim.Optimizer], base_rates: list[list[float]], factor: float) -> None:
    for optimizer, rates in zip(optimizers, base_rates, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor


@dataclass
class _Position:
    """Where validation stands; saved with the checkpoint."""

    best: float = math.inf
    since_best: int = 0

    def exhausted(self, patience: int) -> bool:
        return 0 < patience <= self.since_best


def _validate(
    run: Run, trained: Trained, emas: dict[str, Ema], position: _Position, journal: Journal, done: int, first: int
) -> None:
    """Scores the averaged weights, and keeps the best of those after step `first`."""
    assert trained.validate is not None
    with ExitStack() as stack:
        for ema in emas.values():
            stack.enter_context(ema.applied())
        scores = trained.validate(done)
    if not scores:
        return
    journal.log(done - 1, {f"validation_{name}": value for name, value in scores.items()})
    if done <= first:
        return
    # Of all ranks one: a last digit may differ from machine to machine, and all must gather the weights, or none.
    score = mean_over_ranks(torch.tensor(scores["score"], dtype=torch.float64, device=run.device), run.world).item()
    if score < position.best:
        position.best, position.since_best = score, 0
        save_atomically(_left(trained, emas), run.out / BEST, run.world)
    else:
        position.since_best += 1


def _left(trained: Trained, emas: Mapping[str, Ema]) -> dict[str, dict[str, Tensor]]:
    """Whole tensors of what the stage leaves, on the host."""
    left = {name: module.state_dict() for name, module in trained.carried.items()}
    left |= {name: ema.values for name, ema in emas.items()}
    return {name: {key: full(value).cpu() for key, value in state.items()} for name, state in left.items()}


def _initialise(root: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Create the optimisers' state now: torch's checkpointing would create it at the first save, as if a step had
    been made, and a saved run would differ from one that was not."""
    get_state_dict(root, optimizers)
    for optimizer in optimizers:
        forget(optimizer)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Back to an optimiser's first step."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _state(
    root: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    emas: Mapping[str, Ema],
    position: _Position,
    step: int,
) -> dict[str, Any]:
    modules, optimizer_state = get_state_dict(root, optimizers)
    averages = {name: ema.values for name, ema in emas.items()}
    numbers = torch.tensor([step, position.since_best, position.best], dtype=torch.float64)
    return {"modules": modules, "optimizers": optimizer_state, "emas": averages, "position": numbers}


def _resume(
    checkpoints: Checkpoints,
    root: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    emas: Mapping[str, Ema],
    position: _Position,
) -> int:
    state = _state(root, optimizers, emas, position, 0)
    if not checkpoints.load(state):
        return 0
    set_state_dict(root, optimizers, model_state_dict=state["modules"], optim_state_dict=state["optimizers"])
    numbers = state["position"]
    position.since_best, position.best = int(numbers[1]), float(numbers[2])
    return int(numbers[0])


class _Stop(threading.Event):
    """Set by a signal; `number` says which. On other ranks it stays SIGTERM's, as torchrun sends it."""

    number = int(signal.SIGTERM)


@contextmanager
def _signals() -> Iterator[_Stop]:
    """A flag that SIGINT, SIGTERM or a closed terminal sets: the step under way ends, the state is saved. Again: at
    once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: object) -> None:
        stop.set()
        stop.number = number
        signal.signal(number, before[signal.Signals(number)])

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
    heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup ignores one
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
