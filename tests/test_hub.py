"""Models of the hub: pinned, fetched when asked and not else, verified, and whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from duovsr.errors import InputError, NoSpaceError, UsageError
from duovsr.hub import Reference, find_model, pull
from duovsr.repository import CONFIG, FILES, MANIFEST, TINY_VAE, weights_folder
from duovsr.weights import load_model
from tests.hub_server import Hub, serving

MODEL = "owner/name@v1"
REPOSITORY = {MANIFEST, CONFIG, *FILES}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(weights_folder() / "tiny") as hub:
        yield hub


class Machine:
    """A machine with an empty cache: `run` is `duovsr models ...`, with the hub's own settings in its environment."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment = inherited | {"HF_HOME": str(home), "HF_ENDPOINT": url, "NO_PROXY": "*", "NO_COLOR": "1"}

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "duovsr", "models", *map(str, arguments)]
        settings = self.environment | environment
        return subprocess.run(command, capture_output=True, text=True, env=settings, check=False, timeout=120)

    def does(self, *arguments: object, **environment: str) -> str:
        done = self.run(*arguments, **environment)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    def refuses(self, code: int, words: str, hint: str, *arguments: object, **environment: str) -> None:
        """One line, and a hint."""
        done = self.run(*arguments, **environment)
        error, *hints = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
        assert done.returncode == code, done.stderr
        assert words in error and hint in "".join(hints), done.stderr
        assert "Traceback" not in done.stderr and done.stdout == ""

    @property
    def cache(self) -> Path:
        return self.home / "hub"

    def partial(self, content: bytes) -> Path:
        """Where a file of that content lies until it is whole."""
        return self.cache / "models--owner--name" / "blobs" / f"{hashlib.sha256(content).hexdigest()}.incomplete"

    def cached(self) -> set[str]:
        """The names of the files in all snapshots."""
        return {path.name for path in self.cache.glob("models--*/snapshots/*/*") if path.exists()}


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "home", hub.url)


def test_a_pulled_model_is_used_and_shown_without_the_network(
    hub: Hub, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files |= {"README.md": b"text", "optimizer.safetensors": b"much"}
    done = machine.run("pull", MODEL)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert f"{MODEL}: preset tiny, commit {hub.commit}, verified" in done.stderr
    assert machine.cached() == REPOSITORY  # and no other file of the repository's
    assert hub.asked("vae.safetensors") == [None]

    hub.requests.clear()
    machine.does("pull", MODEL)
    (folder,) = machine.does("path", MODEL).splitlines()
    assert Path(folder).name == hub.commit
    machine.does("verify", MODEL)
    by_name = {each["model"]: each for each in json.loads(machine.does("list", "--json"))}
    assert set(by_name) == {"tiny", MODEL}
    size = sum(len(hub.files[name]) for name in REPOSITORY - {MANIFEST})
    assert by_name[MODEL] == {
        "model": MODEL,
        "preset": "tiny",
        "bytes": size,
        "status": "verified",
        "folder": folder,
    }
    assert f"{MODEL}: tiny, {size / 2**20:.1f} MiB, verified" in machine.does("list").splitlines()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(machine.cache))
    assert load_model(MODEL, torch.device("cpu"), torch.float32).preset.name == "tiny"
    assert find_model(f"owner/name@{hub.commit}").folder == Path(folder)
    assert hub.requests == []


def test_a_light_autoencoder_is_part_of_a_model(hub: Hub, machine: Machine, tmp_path: Path) -> None:
    hub.files[TINY_VAE] = hub.files["vae.safetensors"]
    manifest = json.loads(hub.files[MANIFEST])
    hub.files[MANIFEST] = json.dumps(manifest | {TINY_VAE: manifest["vae.safetensors"]}).encode()
    machine.does("pull", MODEL)
    assert machine.cached() == REPOSITORY | {TINY_VAE}
    assert f"{TINY_VAE}: verified" in machine.does("verify", MODEL).splitlines()
    machine.does("export", MODEL, tmp_path / "out")
    assert (tmp_path / "out" / TINY_VAE).read_bytes() == hub.files[TINY_VAE]


def test_a_tag_stays_at_the_commit_that_it_was_pulled_at(hub: Hub, machine: Machine) -> None:
    machine.does("pull", MODEL)
    first, hub.commit = hub.commit, "f" * 40
    machine.does("pull", MODEL)
    assert Path(machine.does("path", MODEL).strip()).name == first
    machine.does("pull", f"owner/name@{hub.commit}")
    names = {each["model"] for each in json.loads(machine.does("list", "--json"))}
    assert names == {"tiny", MODEL, f"owner/name@{hub.commit}"}


def test_a_broken_download_goes_on_where_it_broke(hub: Hub, machine: Machine) -> None:
    hub.breaks["transformer.safetensors"] = 12_000_000  # the hub's client writes, and can resume, 10 MiB at a time
    machine.does("pull", MODEL)
    whole, rest = hub.asked("transformer.safetensors")
    assert whole is None and rest is not None
    start = int(rest.removeprefix("bytes=").rstrip("-"))
    assert 0 < start <= 12_000_000
    machine.does("verify", MODEL)


def test_a_download_with_more_than_the_file_begins_anew(hub: Hub, machine: Machine) -> None:
    partial = machine.partial(hub.files["vae.safetensors"])
    partial.parent.mkdir(parents=True)
    partial.write_bytes(hub.files["vae.safetensors"] + b"x")
    machine.does("pull", MODEL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_pull_goes_on_where_it_was(hub: Hub, machine: Machine, number: signal.Signals) -> None:
    name = "transformer.safetensors"
    hub.breaks[name], hub.stalls = 12_000_000, {name}
    command = [sys.executable, "-m", "duovsr", "models", "pull", MODEL]
    partial = machine.partial(hub.files[name])
    with subprocess.Popen(command, env=machine.environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
    assert name not in machine.cached()
    machine.refuses(3, "is missing", "", "export", MODEL, machine.home / "out")
    machine.does("pull", MODEL)
    whole, rest = hub.asked(name)
    assert whole is None and rest is not None
    assert 0 < int(rest.removeprefix("bytes=").rstrip("-")) <= 12_000_000
    machine.does("verify", MODEL)
    assert machine.cached() == REPOSITORY and not list(machine.cache.glob("*/blobs/*.incomplete"))


def test_a_finished_download_that_was_not_named_yet_is_taken(hub: Hub, machine: Machine) -> None:
    """Killed between the last byte and its renaming; and what was left there by something else does not verify."""
    for content, code in ((hub.files[name := "vae.safetensors"], 0), (b"x" * len(hub.files[name]), 3)):
        shutil.rmtree(machine.home, ignore_errors=True)
        partial = machine.partial(hub.files[name])
        partial.parent.mkdir(parents=True)
        partial.write_bytes(content)
        hub.requests.clear()
        assert machine.run("pull", MODEL).returncode == code
        assert hub.asked(name) == []
    machine.does("pull", MODEL)
    assert hub.asked(name) == [None], "the damaged one was deleted"


def test_after_an_interrupted_pull_finished_files_are_kept(hub: Hub, machine: Machine) -> None:
    vae = hub.files.pop("vae.safetensors")
    machine.refuses(3, "a file is missing: `owner/name@v1`", "vae.safetensors", "pull", MODEL)
    assert "vae.safetensors missing" in machine.does("list")
    hub.files["vae.safetensors"] = vae
    machine.does("pull", MODEL)
    assert hub.asked("transformer.safetensors") == [None]
    assert machine.cached() == REPOSITORY


@pytest.mark.parametrize("file", ["vae.safetensors", CONFIG])
def test_a_file_with_another_hash_is_deleted(hub: Hub, machine: Machine, file: str) -> None:
    right = hub.files[file]
    hub.files[file] = right[:-1] + bytes([right[-1] ^ 1]) if file != CONFIG else right + b" "
    machine.refuses(3, f"`{file}` of model `{MODEL}` does not match its sha256", "models pull", "pull", MODEL)
    assert machine.cached() == REPOSITORY - {file}
    assert not [path for path in machine.cache.rglob("blobs/*") if path.read_bytes() == hub.files[file]]
    hub.files[file] = right
    machine.does("pull", MODEL)
    assert [len(hub.asked(name)) for name in ("transformer.safetensors", file)] == [1, 2]


def test_what_is_no_model_is_refused_before_its_weights(hub: Hub, machine: Machine) -> None:
    for file, content, words in (
        (CONFIG, b'{"model_type": "t5"}', "not a model of duovsr"),
        (MANIFEST, b'{"vae.safetensors": 1}', "damaged model manifest"),
    ):
        right, hub.files[file] = hub.files[file], content
        machine.refuses(3, words, "", "pull", MODEL)
        hub.files[file] = right
    assert hub.asked("transformer.safetensors") == [] and machine.cached() == set()
    machine.does("pull", MODEL)


@pytest.mark.parametrize(
    ("name", "code", "words", "hint"),
    [
        ("owner/other@v1", 3, "no such model repository, or no access to it: `owner/other@v1`", "hf auth login"),
        ("owner/name@v2", 3, "no such revision: `owner/name@v2`", "its tags: v1"),
        (f"owner/name@{'a' * 40}", 3, "no such revision", "40 hex digits"),
        ("owner/name@dev", 2, "a branch moves: `owner/name@dev`", "owner/name@0123456789abcdef"),
    ],
)
def test_what_the_hub_does_not_have_is_refused(machine: Machine, name: str, code: int, words: str, hint: str) -> None:
    machine.refuses(code, words, hint, "pull", name)
    assert machine.cached() == set()


def test_no_network_says_so(machine: Machine) -> None:
    refused = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    machine.refuses(3, "cannot fetch model `owner/name@v1` (", "check the connection", "pull", MODEL, **refused)
    machine.does("pull", MODEL)
    machine.does("pull", MODEL, **refused)


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_space)
    with pytest.raises(NoSpaceError, match=f"no space for model `owner/name@{'a' * 40}` in `{tmp_path}`"):
        pull(Reference("owner/name", "a" * 40))


def test_offline_mode_uses_the_cache_alone(hub: Hub, machine: Machine) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    machine.refuses(3, "HF_HUB_OFFLINE is set: `owner/name@v1`", "", "pull", MODEL, **offline)
    assert hub.requests == []
    machine.does("pull", MODEL)
    hub.requests.clear()
    machine.does("pull", MODEL, **offline)
    machine.does("verify", MODEL, **offline)
    assert hub.requests == []


def test_nothing_is_fetched_unasked(
    hub: Hub, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("path", "verify"):
        machine.refuses(3, f"model not fetched yet: `{MODEL}`", f"duovsr models pull {MODEL}", verb, MODEL)
    machine.does("list")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="model not fetched yet") as caught:
        load_model(MODEL, torch.device("cpu"), torch.float32)
    assert caught.value.hint == f"duovsr models pull {MODEL}"
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/name", "neither a folder nor a pinned model repository: `owner/name`"),
        ("owner/name@main", "a branch moves"),
        ("owner/name@", "not a model repository"),
        ("owner/na--me@v1", "not a model repository"),
        ("owner/na me@v1", "not a model repository"),
        ("a/b/c@v1", "unknown model"),
        ("nonsense", "unknown model"),
    ],
)
def test_a_name_that_pins_nothing_is_refused(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        find_model(name)
    assert "@" in str(caught.value.hint)


def test_a_reference_reads_as_it_was_written() -> None:
    assert str(Reference.parse("owner/name-1.3b@release/v1.0")) == "owner/name-1.3b@release/v1.0"


def test_a_damaged_file_is_found_and_fetched_again(hub: Hub, machine: Machine) -> None:
    machine.does("pull", MODEL)
    path = Path(machine.does("path", MODEL).strip(), "vae.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:-1])
    done = machine.run("verify", MODEL)
    assert done.returncode == 3 and "vae.safetensors: altered" in done.stdout.splitlines()
    assert f"hint: duovsr models pull {MODEL}" in done.stderr.splitlines()
    assert "vae.safetensors altered" in machine.does("list")
    machine.refuses(3, "does not match its sha256, and was deleted", "fetch it again", "pull", MODEL)
    machine.does("pull", MODEL)
    machine.does("verify", MODEL)


def test_an_exported_repository_is_a_model_that_a_hub_can_serve(machine: Machine, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "my-model"
    machine.does("export", "tiny", out)
    assert {path.name for path in out.iterdir()} == {*REPOSITORY, "README.md"}
    machine.does("verify", out)
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: duovsr\n") and "# my-model\n" in card and "`tiny`" in card
    machine.refuses(2, f"`{out}` holds a `config.json` already", "another folder", "export", "tiny", out)

    hub.files = {path.name: path.read_bytes() for path in out.iterdir()}
    machine.does("pull", MODEL)
    again = tmp_path / "again"
    again.mkdir()
    (again / "README.md").write_text("my own card")
    machine.does("export", MODEL, again)
    assert (again / "README.md").read_text() == "my own card"
    assert (again / CONFIG).is_file() and not (again / CONFIG).is_symlink()

    (out / "README.md").write_text("a card")
    machine.does("export", out, tmp_path / "third")
    assert (tmp_path / "third" / "README.md").read_text() == "a card"


@pytest.mark.parametrize("name", sorted(REPOSITORY))
def test_an_export_replaces_no_file(machine: Machine, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    machine.refuses(2, f"`{tmp_path}` holds a `{name}` already", "choose another folder", "export", "tiny", tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_that_does_not_verify_is_not_exported(machine: Machine, tmp_path: Path) -> None:
    shutil.copytree(weights_folder() / "tiny", tmp_path / "mine")
    (tmp_path / "mine" / FILES[2]).write_bytes(b"")
    machine.refuses(
        3, "does not match its sha256", "duovsr train export", "export", tmp_path / "mine", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
