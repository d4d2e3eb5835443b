"""`duovsr models`: what is on this disk, and fetching more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from duovsr.cli.parameters import Json
from duovsr.cli.show import print_json, print_line, say, show
from duovsr.errors import InputError
from duovsr.repository import Model, shipped_models

Name = Annotated[str, typer.Argument(metavar="MODEL", help="A preset, a folder, or owner/name@revision.")]

models = typer.Typer(rich_markup_mode=None, help="List, fetch, verify and export models. Only `pull` uses the network.")


@models.command("list")
def list_models(as_json: Json = False) -> None:
    """Show the shipped and the fetched models, each verified anew."""
    from duovsr.hub import cached_models

    records = [_record(model) for model in (*shipped_models(), *cached_models())]
    if as_json:
        print_json(records)
        return
    for record in records:
        size = f"{record['bytes'] / 2**20:.1f} MiB"
        show({record["model"]: f"{record['preset'] or 'unknown preset'}, {size}, {record['status']}"}, as_json=False)


@models.command()
def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="owner/name@revision: a tag, or a commit.")],
) -> None:
    """Fetch a model from the Hugging Face hub, and verify it."""
    from duovsr.hub import Reference
    from duovsr.hub import pull as pull_model

    pulled = pull_model(Reference.parse(model))
    say(f"{model}: preset {pulled.preset.name}, commit {pulled.folder.name}, verified")


@models.command()
def verify(model: Name, as_json: Json = False) -> None:
    """Compare every file with its sha256; exit code 3 if one is missing or altered."""
    from duovsr.hub import find_model

    found = find_model(model)
    states = {status.path.name: _state(status.sha256, status.verified) for status in found.check()}
    show(states, as_json)
    if set(states.values()) != {"verified"}:
        raise InputError(f"model does not verify: `{model}`", hint=found.remedy)


@models.command()
def path(model: Name) -> None:
    """Print the folder of a model."""
    from duovsr.hub import find_model

    print_line(find_model(model).folder)


@models.command()
def export(
    model: Name,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder; a README.md in it is kept.")],
) -> None:
    """Copy a model as a repository folder, ready to upload."""
    from duovsr.hub import export_repository, find_model
    from duovsr.video.output import disk_errors

    with disk_errors(out):
        export_repository(find_model(model), out)
    say(f"{out}: model repository; see its README.md before you upload it")


def _record(model: Model) -> dict[str, Any]:
    """What `list` tells of a model."""
    record = {"model": model.name, "preset": None, "bytes": 0, "status": "verified", "folder": str(model.folder)}
    try:
        statuses = model.check()
        record["bytes"] = sum(status.size for status in statuses)
        bad = [f"{status.path.name} {_state(status.sha256, False)}" for status in statuses if not status.verified]
        record["status"] = ", ".join(bad) or "verified"
        record["preset"] = model.preset.name
    except InputError as error:
        record["status"] = str(error)
    return record


def _state(sha256: str | None, verified: bool) -> str:
    return "verified" if verified else "missing" if sha256 is None else "altered"
