"""The benchmarks that wait for a GPU run whole on a CPU, at toy sizes and without PyAV; costs and charts say what they
should."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ABSENT = ("av", "typer", "click", "rich", "tqdm", "huggingface_hub", "xformers", "diffusers", "matplotlib")
pytest.importorskip("triton")


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """The script, its cases at toy sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        module, cases = (importlib.import_module(name) for name in ("gpu", "kernel_cases"))
        for table in ("MODELS", "PLACES", "WINDOWS", "VAE_STAGES"):
            patch.setattr(cases, table, dict(getattr(cases, table)))
        module.shrink_cases()
        yield module


@pytest.fixture
def session(gpu: ModuleType, tmp_path: Path) -> Any:
    return gpu.Session(CPU, True, tmp_path / "gpu.json", minutes=1)


def test_everything_runs_with_torch_triton_and_numpy_alone(tmp_path: Path) -> None:
    program = (
        f"import runpy, sys\nsys.modules |= dict.fromkeys({ABSENT})\n"
        "sys.argv = ['gpu.py', '--device', 'cpu', '--small', '--out', sys.argv[1]]\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'gpu.py')!r}, run_name='__main__')\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "gpu.json")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["machine"]["cpu"] and record["machine"]["versions"]
    parts = record["parts"]
    assert next(iter(parts)) == "kernels are right, bfloat16"
    assert not {"failed", "skipped"} & {key for part in parts.values() for key in part}
    rows = {name: parts[name]["rows"][0] for name in ("1.3b", "1.3b, TinyVAE", "tiny")}
    for row in rows.values():
        floor = row["floor_seconds"]
        assert floor["total"] == pytest.approx(sum(floor.values()) - floor["total"])
        assert row["times_floor"]["total"] == pytest.approx(row["seconds"]["median"] / floor["total"])
        assert {stage for stage in floor if stage != "total"} <= set(row["stages"])
        assert sum(each["least"] for each in row["stages"].values()) <= row["seconds"]["most"]
        assert row["peak_gib"] > 0 and row["planned_gib"] > 0
    assert rows["1.3b"]["tflop"]["decode"] > rows["1.3b, TinyVAE"]["tflop"]["decode"]
    assert "| `tiny`, 5 frames of 64x48 |" in done.stdout


def test_a_wrong_kernel_ends_it(gpu: ModuleType, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu.run_twin
    monkeypatch.setattr(gpu, "run_twin", lambda *case: tuple(1.1 * result for result in right(*case)))
    with pytest.raises(gpu.WrongError, match="attention full"):
        gpu.measure_all(session, torch.float32)
    parts = json.loads(session.path.read_text())["parts"]
    assert list(parts) == ["wrong"] and all(row["error"] > 0.05 for row in parts["wrong"]["rows"])


def test_kernels_that_cannot_be_checked_end_it(gpu: ModuleType, session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(gpu, "run_twin")
    with pytest.raises(gpu.WrongError, match="could not be checked"):
        gpu.measure_all(session, torch.float32)


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(session: Any) -> None:
    def failing() -> list[dict[str, Any]]:
        raise torch.OutOfMemoryError("too large")

    assert session.run("first", failing) == []
    assert session.run("second", lambda: [{"seconds": 1}]) == [{"seconds": 1}]
    parts = json.loads(session.path.read_text())["parts"]
    assert parts["first"]["failed"] == "OutOfMemoryError: too large"
    assert parts["second"]["rows"] == [{"seconds": 1}]


def test_no_part_begins_after_the_time_is_up(session: Any) -> None:
    session.deadline = time.monotonic()
    assert session.run("late", lambda: pytest.fail("it began")) == []
    assert "skipped" in json.loads(session.path.read_text())["parts"]["late"]


def test_the_fastest_block_sizes_are_taken(gpu: ModuleType) -> None:
    from duovsr.kernels.fused import attention

    tuned = [
        {"blocks": {"BLOCK_M": m}, "milliseconds": {"median": ms} if ms else {"failed": "too large"}}
        for m, ms in ((16, 3.0), (32, 2.0), (64, None))
    ]
    before = attention.config
    rows = gpu.with_tuned_blocks([{"tuned": tuned}], lambda: [{"used": attention.config(64)}])
    assert rows == [{"used": {"BLOCK_M": 32}, "blocks": {"BLOCK_M": 32}}]
    assert attention.config is before
    assert gpu.with_tuned_blocks([], lambda: pytest.fail("nothing was tuned")) == []


def test_the_autoencoder_beside_diffusers_is_the_same(gpu: ModuleType) -> None:
    pytest.importorskip("diffusers")
    config = gpu.preset_of("1.3b", "wan", small=True).vae
    row = gpu.measure_beside_diffusers(config, CPU, torch.float32, (48, 32), 5, repeat=1)
    assert row["error_of_latents"] < 1e-5 and row["speed_relative_to_diffusers"] > 0


@pytest.fixture(scope="module")
def cost(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("cost")


@pytest.fixture(scope="module")
def costs(cost: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    path, threads = tmp_path_factory.mktemp("cost") / "cost.json", torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cost.py", "--small", "--repeat", "1", "--out", str(path)])
        cost.main()
    yield json.loads(path.read_text())
    torch.set_num_threads(threads)


def test_a_row_is_measured_in_a_process_of_its_own(cost: ModuleType) -> None:
    row = cost.measure_alone(cost.rows_of_tiny(small=True)[0], repeat=1, small=True)
    assert row["frames"] == 5 and row["processor_seconds"]["median"] > 0 and 0.1 < row["peak_gib"] < 2


def test_costs_are_measured_and_counted(costs: dict[str, Any]) -> None:
    assert [row["tiles"] for row in costs["measured"]] == [1, 1, 1, 2]
    assert all(row["processor_seconds"]["median"] > 0 and row["peak_gib"] > 0 for row in costs["measured"])
    assert costs["lines"]["tiny"]["by_frames"]["largest_deviation"] == pytest.approx(0, abs=1e-6)  # of two points
    full, window, _ = costs["counted"]["pixels"]
    assert window["tflop"]["decode"] == full["tflop"]["decode"] and window["tflop"]["transformer"] > 0
    many, most = costs["counted"]["frames"][-2:]
    assert most["tflop"] / many["tflop"] == pytest.approx(most["calls"] / many["calls"], rel=0.05)
    assert most["tflop_as_one_clip"] > most["tflop"]


def test_windows_need_less_where_it_is_said(costs: dict[str, Any]) -> None:
    found, (alone, *_, last) = costs["crossover"], costs["crossover"]["rows"]
    length, side = found["window_tokens"], found["fewer_flops_from_side_tokens"]
    assert alone["flops"]["window"] == alone["flops"]["full"]  # one window is the whole frame
    assert last["flops"]["full"] == 4 * last["flops"]["window"]  # of twice the side: four windows
    assert (side - 1) ** 2 <= 2 * length**2 < side**2  # four windows of length^4 products against side^4


def test_charts_are_drawn_small(
    costs: dict[str, Any], gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts = importlib.import_module("charts")
    monkeypatch.setattr(charts, "RESULTS", tmp_path)
    for name in ("cpu_speed.json", "cpu_speed_amx.json", "quality.json", "training.json"):
        (tmp_path / name).write_bytes((ROOT / "benchmarks" / "results" / name).read_bytes())
    (tmp_path / "cost.json").write_text(json.dumps(costs))
    stages = {stage: {"median": 0.1} for stage in ("encode", "transformer", "decode")}
    row = {"workload": "`tiny`", "stages": stages, "floor_seconds": {**dict.fromkeys(stages, 0.05), "total": 0.15}}
    row |= {"times_floor": {**dict.fromkeys(stages, 2.0), "total": 2.0}, "peak_gib": 1.0, "planned_gib": 2.0}
    row |= {"seconds": {"median": 0.3, "least": 0.2, "most": 0.4}}
    (tmp_path / "gpu_x.json").write_text(json.dumps({"machine": {"device": "X"}, "parts": {"tiny": {"rows": [row]}}}))
    paths = charts.draw_all(tmp_path)
    assert {path.name for path in paths} == {
        f"chart_{name}.png" for name in ("cpu_speed", "quality", "cost", "cost_1_3b", "training", "gpu_x")
    }
    assert all(0 < path.stat().st_size < 150_000 for path in paths)


def test_the_card_has_the_rows_of_the_charts(gpu: ModuleType) -> None:
    charts = importlib.import_module("charts")
    rows = charts.card_rows(charts.CARD.read_text())
    assert {(of, name) for of in charts.SETS for name in ("bicubic", charts.PEER)} <= set(rows)
    assert rows["real", "bicubic"]["psnr_y"] == 24.41


def test_the_scores_of_the_card_are_those_measured_of_the_shipped_files(gpu: ModuleType) -> None:
    charts = importlib.import_module("charts")
    rows = charts.card_rows(charts.CARD.read_text())
    measured = json.loads((charts.RESULTS / "quality.json").read_text())
    shipped = json.loads((charts.CARD.parent / "tiny" / "manifest.json").read_text())
    assert measured["models"]["tiny"] == {name: of["sha256"] for name, of in shipped.items()}
    for of in charts.SETS:
        means = measured["sets"][of]["means"]
        for name, value in rows[of, "**tiny**"].items():
            digits = {"psnr_y": 2, "vmaf": 1, "niqe": 2}.get(name, 3)
            assert value == round(means[name], digits), (of, name)


def test_curves_are_a_runs_own_and_tell_a_run_that_differs(gpu: ModuleType, tmp_path: Path) -> None:
    curves = importlib.import_module("curves")

    def run(name: str, losses: dict[int, float], seed: int = 1) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows: list[dict[str, float]] = [{"step": step, "seconds": 1, "loss": loss} for step, loss in losses.items()]
        rows.insert(2, {"step": 20, "seconds": 2, "validation_psnr": 28.0})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs = {"init": "/somewhere/weights", "data": ["/somewhere/pool"], "held_out": ["/somewhere/else"]}
        settings = {"stage": "refine", "settings": {"seed": seed}, "versions": {}, "inputs": inputs}
        (folder / "settings.json").write_text(json.dumps(settings))
        return folder

    logged = run("logged", {0: 1.0, 100: 3.0, 200: 5.0})
    record = curves.curves(logged)
    assert record["losses"] == [{"step": 0, "loss": 2.0}, {"step": 200, "loss": 5.0}]
    assert record["validation"] == [{"step": 20, "validation_psnr": 28.0}]
    # no paths of a machine
    assert (record["init"], record["pools"], record["held_out"]) == ("weights", ["pool"], ["else"])
    runs = [run("another", {0: 1.0}, seed=2), logged]
    same = curves.repeated(runs, run("same", {0: 1.0, 100: 3.0}))
    assert (same["run"], same["largest_difference"]) == ("logged", 0)
    assert curves.repeated(runs, run("other", {0: 1.0, 100: 2.5}))["largest_difference"] == 0.5
    with pytest.raises(SystemExit):
        curves.repeated(runs, run("neither", {0: 1.0}, seed=3))


@pytest.mark.parametrize(
    ("name", "work"),
    [("memory", "measure"), ("memory_plan", "plan_for"), ("precision", "layer_error"), ("toy", "measure")],
)
def test_help_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, work: str
) -> None:
    """It would write over what was recorded."""
    module = importlib.import_module(f"benchmarks.{name}")

    def refuse(*_: object) -> None:
        raise AssertionError("the measurement has begun")

    monkeypatch.setattr(module, work, refuse)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    assert (module.__doc__ or "").split(".")[0].split()[-1] in capsys.readouterr().out


def test_a_net_shows_in_the_spectrum() -> None:
    held_out = importlib.import_module("benchmarks.held_out")
    generator = torch.Generator().manual_seed(0)
    pattern = torch.zeros(8, 8, dtype=torch.float64)
    pattern[3, 4] = 4

    def net(amount: float) -> float:
        noise = torch.randn(20, held_out.SIDE, held_out.SIDE, generator=generator, dtype=torch.float64)
        pictures = 128 + 4 * noise + amount * pattern.repeat(held_out.SIDE // 8, held_out.SIDE // 8)
        return held_out.net(torch.stack([held_out.power(picture) for picture in pictures]).mean(0))  # type: ignore[no-any-return]

    assert 0.8 < net(0) < 1.2
    assert net(1) > 2
