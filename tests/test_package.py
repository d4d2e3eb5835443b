"""The package as a whole: who may import whom, what starting it costs, what the wheel carries, which flags exist."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "duovsr"
MODULES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "options"}
MAY_IMPORT = {  # DESIGN section 6; every part may import itself, and a new part needs a row
    "errors": set(),
    "options": {"errors"},
    "kernels": BASE,
    "model": BASE | {"kernels"},
    "repository": BASE,
    "hub": BASE | {"repository"},
    "weights": BASE | {"model", "repository", "hub"},
    "video": BASE,
    "metrics": BASE | {"video"},
    "engine.plan": BASE,
    "engine": BASE | {"model", "video", "repository", "weights", "engine.plan", "__init__"},
    "train": BASE | {"model", "repository", "weights", "video", "metrics"},
    "progress": BASE,
    "cli": BASE
    | {"kernels", "model", "repository", "hub", "weights", "video", "metrics"}
    | {"engine.plan", "engine", "train", "progress", "__init__"},
    "__init__": BASE | {"engine"},
    "__main__": {"cli"},
}
UPSCALE_FLAGS = set(
    "--scale --size --model --device --dtype --vae --seed --strength --chunk --overlap --tile --window"
    " --attention --color --decoder --start --end --fps --no-audio --no-subs --no-deinterlace --no-scene-cuts"
    " --codec --crf --pix-fmt --encoder-opt --recursive --pattern --suffix"
    " --restart --overwrite --dry-run --json --help".split()
)


def part_of(module: str) -> str:
    """`duovsr.model.flow` -> `model`."""
    names = module.split(".")[1:] or ["__init__"]
    return "engine.plan" if names[:2] == ["engine", "plan"] else names[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """The modules of duovsr that these statements import, `from duovsr.engine import plan` as `duovsr.engine.plan`."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {
                name
                for name in names
                if any((ROOT / name.replace(".", "/")).with_suffix(s).exists() for s in ("", ".py"))
            }
            found |= modules or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "duovsr"}


def on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: no function bodies, nothing under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from on_import(node)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=settings, cwd=ROOT, check=False)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    part = part_of(module_of(path))
    targets = {part_of(name) for name in imported(ast.walk(ast.parse(path.read_text())))}
    assert targets <= MAY_IMPORT[part] | {part}


@pytest.mark.parametrize("path", [*sorted((PACKAGE / "cli").glob("*.py")), PACKAGE / "__init__.py"], ids=module_of)
def test_the_entrance_imports_the_heavy_parts_lazily(path: Path) -> None:
    targets = {part_of(name) for name in imported(on_import(ast.parse(path.read_text())))}
    assert not targets & {"kernels", "model", "weights", "engine", "train"}


def test_the_import_rules_see_what_they_should() -> None:
    tree = ast.parse(
        "import torch\nfrom duovsr.engine import plan\nfrom duovsr.options import Preset\n"
        "if TYPE_CHECKING:\n    from duovsr.model.flow import x\ndef f():\n    import duovsr.train.base\n"
    )
    assert imported(on_import(tree)) == {"duovsr.engine.plan", "duovsr.options"}
    assert imported(ast.walk(tree)) == imported(on_import(tree)) | {"duovsr.model.flow", "duovsr.train.base"}


@pytest.mark.parametrize("path", sorted(p for d in ("duovsr", "tests", "benchmarks") for p in (ROOT / d).rglob("*.py")))
def test_files_are_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_help_is_quick_and_imports_no_torch() -> None:
    program = (
        "import json, os, sys\n"
        "from duovsr.cli import main\n"
        "sys.argv = ['duovsr', '--help']\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "loaded = sorted({name.split('.')[0] for name in sys.modules})\n"
        "print(json.dumps([loaded, sum(os.times()[:2])]), file=sys.stderr)"
    )
    runs = [run(sys.executable, "-c", program) for _ in range(3)]
    assert [done.returncode for done in runs] == [0, 0, 0], runs[0].stderr
    reports = [json.loads(done.stderr.splitlines()[-1]) for done in runs]
    assert not {"torch", "triton", "xformers"} & set(reports[0][0])
    # Processor time, the best of three: wall time on a shared machine measures its neighbours. 0.5 s is the aim.
    assert min(seconds for _, seconds in reports) < 0.5


def test_importing_the_package_imports_no_torch() -> None:
    done = run(sys.executable, "-c", "import sys, duovsr; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr


def test_console_script_and_module_are_the_same_program() -> None:
    script = Path(sys.executable).with_name("duovsr")
    assert script.exists(), "not installed: run `pip install -c constraints.txt -e '.[dev]'`"
    by_script, by_module = run(str(script), "--help"), run(sys.executable, "-m", "duovsr", "--help")
    assert by_script.returncode == by_module.returncode == 0, by_script.stderr + by_module.stderr
    listed = [
        set(re.findall(r"^\W*(upscale|eval|doctor|bench)\b", done.stdout, re.M)) for done in (by_script, by_module)
    ]
    assert listed == [{"upscale", "eval", "doctor", "bench"}] * 2


def test_upscale_has_these_flags_and_no_others() -> None:
    done = run(sys.executable, "-m", "duovsr", "upscale", "--help")
    assert done.returncode == 0, done.stderr
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.stdout)) == UPSCALE_FLAGS
    assert re.search(r"\bSRC\b.*\bDST\b", done.stdout)


def test_readme_tells_of_every_flag_of_upscale() -> None:
    readme = (ROOT / "README.md").read_text()
    usage = readme[readme.index("## Use") : readme.index("## How it works")]
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage)) >= UPSCALE_FLAGS - {"--help"}


def test_wheel_carries_weights_and_types(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend, of the [dev] extra, is not installed")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    weights = {str(path.relative_to(ROOT / "weights")): path.stat().st_size for path in (ROOT / "weights").rglob("*.*")}
    assert {"tiny/manifest.json", "MODEL_CARD.md"} <= set(weights)
    assert {f"duovsr/_weights/{name}": size for name, size in weights.items()}.items() <= sizes.items()
    assert max(weights.values()) <= 16 * 2**20 and sum(weights.values()) <= 32 * 2**20
    assert {"duovsr/py.typed", *(str(path.relative_to(ROOT)) for path in MODULES)} <= set(sizes)
    assert not [name for name in sizes if not name.startswith(("duovsr/", "duovsr-"))]


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = set(re.findall(r"^([\w.-]+)==[\w.]+$", (ROOT / "constraints.txt").read_text(), re.M))
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["train"], *extras["eval"], *extras["dev"]]
    names = {re.match(r"[\w.-]+", requirement)[0] for requirement in wanted} - {"duovsr"}  # type: ignore[index]
    assert names <= pinned


def test_sample_clip_is_what_the_demo_expects() -> None:
    path = ROOT / "benchmarks" / "sample.mp4"
    assert path.stat().st_size < 600 * 1024
    with av.open(path) as clip:
        video, audio = clip.streams.video[0], clip.streams.audio[0]
        assert (video.width, video.height, video.frames) == (320, 180, 75)
        assert (audio.codec_context.name, audio.layout.name) == ("aac", "stereo")
