"""Models by what `--model` takes: a preset, a folder, or a repository of the Hugging Face hub at a pinned revision.

Nothing is fetched but by `pull`; everything else looks at this disk. Downloads lie in the hub's own cache (`HF_HOME`),
whose `refs/` records the commit that a tag stood for when it was pulled: it stands for that from then on.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from duovsr.errors import InputError, NoSpaceError, UsageError, says_no_space
from duovsr.options import PRESETS
from duovsr.repository import CONFIG, EMBEDDED, FILES, MANIFEST, Model, shipped_models

_BRANCH = "main"  # the hub's default branch, which moves
_COMMIT = re.compile("[0-9a-f]{40}")
_PINNING = "pin a tag or a commit: `owner/name@v1.0`, or `owner/name@` with its 40 hex digits"
_README = """---
library_name: duovsr
tags: [video-super-resolution]
---
# {title}

A model of preset `{preset}` for duovsr: video super-resolution in one step.

```bash
duovsr models pull OWNER/NAME@REVISION
duovsr upscale in.mp4 out.mp4 --model OWNER/NAME@REVISION
```

To be written: the licence, what it was trained on and how, measured quality, known limits.
"""


@dataclass(frozen=True)
class Reference:
    """A repository of the hub at a revision: a tag, or a commit."""

    repository: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises UsageError where `text` is not `owner/name@revision`, or the revision is one that moves."""
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./+-]+))?", text, re.ASCII)
        if match is None:
            raise UsageError(f"not a model repository: `{text}`", hint="write `owner/name@revision`")
        repository, revision = match.groups()
        if revision is None:
            raise UsageError(f"neither a folder nor a pinned model repository: `{text}`", hint=_PINNING)
        if revision == _BRANCH:
            raise UsageError(f"a branch moves: `{text}`", hint=_PINNING)
        return cls(repository, revision)

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"

    @property
    def remedy(self) -> str:
        return f"duovsr models pull {self}"


def find_model(name: str) -> Model:
    """The model that `--model` names, with its files on this disk. Raises UsageError, InputError if not pulled yet."""
    for model in shipped_models():
        if model.name == name:
            return model
    if name in PRESETS:
        hint = f"use `--model {EMBEDDED}`, a folder of `duovsr train export`, or `owner/name@revision`"
        raise UsageError(f"no weights for model `{name}` are shipped", hint=hint)
    if os.path.isdir(name):
        return Model(name, Path(name).resolve(), "make it with `duovsr train export`")
    if name.partition("@")[0].count("/") != 1:
        known = ", ".join(model.name for model in shipped_models())
        hint = f"use one of: {known}; or a folder of `duovsr train export`, or `owner/name@revision`"
        raise UsageError(f"unknown model: `{name}`", hint=hint)
    reference = Reference.parse(name)
    folder = _cached_folder(reference)
    if folder is None:
        raise InputError(f"model not fetched yet: `{reference}`", hint=reference.remedy)
    return Model(name, folder, reference.remedy)


def cached_models() -> list[Model]:
    """What was pulled: a model for each tag of a commit, or for the commit where no tag of it was asked for."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return []
    references = {
        Reference(repository.repo_id, name): revision.snapshot_path
        for repository in cache.repos
        if repository.repo_type == "model"
        for revision in repository.revisions
        if (revision.snapshot_path / MANIFEST).is_file()
        for name in revision.refs - {_BRANCH} or {revision.commit_hash}
    }
    return [Model(str(each), references[each], each.remedy) for each in sorted(references, key=str)]


def pull(reference: Reference) -> Model:
    """Download what is missing of a model, and verify it. A file that does not match its sha256 is deleted.

    What broke off is taken up where it did, by this command or, after it was killed, by the next.
    Raises InputError, UsageError for a revision that is not pinned, NoSpaceError.
    """
    with _hub_errors(reference):
        folder = _cached_folder(reference) or _pin(reference)
        model = Model(str(reference), folder, reference.remedy)
        _download(reference, folder, CONFIG)
        try:
            _, names = model.preset, model.files
        except InputError:  # before gigabytes of something else; and so that a damaged one is fetched anew
            _delete(folder / CONFIG)
            _delete(folder / MANIFEST)
            raise
        for name in names:
            _download(reference, folder, name)
    for status in model.check():
        if not status.verified:
            _delete(status.path)
            raise InputError(
                f"`{status.path.name}` of model `{reference}` does not match its sha256, and was deleted",
                hint=f"fetch it again: {model.remedy}",
            )
    return model


def export_repository(model: Model, out: Path) -> None:
    """Copy a verified model to the folder `out`, ready to upload; its README is `out`'s, the model's own, or a stub.

    Raises UsageError where a name is taken, InputError for a model that does not verify.
    """
    names = (*model.files, MANIFEST)  # the manifest last: until then it is no model
    taken = next((name for name in names if os.path.lexists(out / name)), None)
    if taken is not None:
        raise UsageError(f"`{out}` holds a `{taken}` already", hint="choose another folder")
    model.require_verified()
    preset = model.preset
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix=".export-") as partial:
        for name in names:
            shutil.copyfile(model.folder / name, Path(partial, name))
        for name in names:
            Path(partial, name).replace(out / name)
    readme = out / "README.md"
    if readme.exists():
        return
    if (model.folder / readme.name).is_file():
        shutil.copyfile(model.folder / readme.name, readme)
    else:
        content = _README.format(title=out.resolve().name, preset=preset.name)
        readme.write_text(content, encoding="utf-8", errors="surrogateescape")  # a folder's name may be any bytes


def _cached_folder(reference: Reference) -> Path | None:
    """Where the files of the revision lie in the hub's cache, all or some of them; the folder's name is the commit."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        manifest = try_to_load_from_cache(reference.repository, MANIFEST, revision=reference.revision)
    except HFValidationError as error:
        raise UsageError(f"not a model repository: `{reference}`", hint="write `owner/name@revision`") from error
    return Path(manifest).parent if isinstance(manifest, str) else None


def _pin(reference: Reference) -> Path:
    """Download the manifest, which records the commit of the revision, and return the folder that it lies in."""
    from huggingface_hub import HfApi, hf_hub_download

    if not _COMMIT.fullmatch(reference.revision):
        refs = HfApi().list_repo_refs(reference.repository)
        tags = [tag.name for tag in refs.tags]
        if reference.revision not in tags:
            branches = {branch.name: branch.target_commit for branch in refs.branches}
            if reference.revision in branches:
                hint = f"pin its commit: `{reference.repository}@{branches[reference.revision]}`"
                raise UsageError(f"a branch moves: `{reference}`", hint=hint)
            hint = f"its tags: {', '.join(tags) or 'none'}; or a commit's 40 hex digits"
            raise InputError(f"no such revision: `{reference}`", hint=hint)
    return Path(hf_hub_download(reference.repository, MANIFEST, revision=reference.revision)).parent


def _download(reference: Reference, folder: Path, name: str) -> None:
    from huggingface_hub import hf_hub_download, hf_hub_url

    if not (folder / name).exists():  # the hub's client makes requests of its own even for what is there
        with FileLock(folder.parents[1] / "pull.lock"):
            _fetch_blob(hf_hub_url(reference.repository, name, revision=folder.name), folder.parents[1] / "blobs")
        hf_hub_download(reference.repository, name, revision=folder.name)  # finds it, and gives it its name


def _fetch_blob(url: str, blobs: Path) -> None:
    """Download a file to the place where the hub's client looks for it, on from what an interrupted command left there.

    The client's own download begins a file anew in each process, and keeps nothing of one that it does not finish.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented as public

    facts = get_hf_file_metadata(url)
    if facts.etag is None:  # the client has the words for that
        return
    blob = blobs / facts.etag
    if blob.exists():
        return
    headers = build_hf_headers()
    if urlsplit(facts.location).netloc != urlsplit(url).netloc:  # where the file is stored has its own key in the URL
        headers.pop("authorization", None)
    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab") as file:
        if facts.size is not None and file.tell() > facts.size:  # what no more bytes would mend
            file.seek(0)
            file.truncate()
        if file.tell() != facts.size:
            http_get(facts.location, file, resume_size=file.tell(), headers=headers, expected_size=facts.size)
    partial.replace(blob)


@contextmanager
def _hub_errors(reference: Reference) -> Iterator[None]:
    """What can go wrong on the way, in one line each."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    network_error: Any = HfHubHTTPError.__bases__[0]  # the HTTP client's, which is another with each major version
    try:
        yield
    except RepositoryNotFoundError as error:
        hint = "check the name; a private or gated one needs `hf auth login`"
        raise InputError(f"no such model repository, or no access to it: `{reference}`", hint=hint) from error
    except RevisionNotFoundError as error:
        raise InputError(f"no such revision: `{reference}`", hint="name a tag, or a commit's 40 hex digits") from error
    except (OSError, network_error) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            hint = f"a repository has {', '.join((MANIFEST, CONFIG, *FILES))}: see `duovsr models export`"
            raise InputError(f"not a model of duovsr, a file is missing: `{reference}`", hint=hint) from error
        if says_no_space(error):
            raise NoSpaceError(f"no space for model `{reference}` in `{constants.HF_HUB_CACHE}`") from error
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"model not fetched, and HF_HUB_OFFLINE is set: `{reference}`") from error
        reason = str(error.__cause__ or error).partition("\n")[0]
        hint = f"check the connection, then go on with: {reference.remedy}"
        raise InputError(f"cannot fetch model `{reference}` ({reason})", hint=hint) from error


def _delete(path: Path) -> None:
    """A file of the cache, and what it links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
