"""`duovsr train encode-prompt`, with a text encoder of a few numbers in place of transformers' UMT5."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from duovsr.errors import InputError, UsageError
from duovsr.options import PRESETS
from duovsr.train.encode_prompt import NULL, POSITIVE, PromptConfig
from duovsr.train.stages import Job, resolve, run_job

LENGTH, WIDTH = 6, 4


class Tokenizer:
    """A token a word, and one for the end."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[*map(len, text.split()), 99]]))


class Encoder:
    def eval(self) -> Encoder:
        return self

    def __call__(self, tokens: torch.Tensor) -> Any:
        states = tokens[..., None].expand(-1, -1, WIDTH).to(torch.bfloat16)
        return SimpleNamespace(last_hidden_state=states)


@pytest.fixture
def wan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text encoder, and the transformers package that reads it from there."""
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "wan" / part).mkdir(parents=True)

    def loads(what: Any, part: str) -> Any:
        def from_pretrained(folder: Path, *, local_files_only: bool, **settings: Any) -> Any:
            assert folder == tmp_path / "wan" / part and local_files_only
            if (folder / "damaged").exists():
                raise OSError("no such weights\nand more")
            return what

        return SimpleNamespace(from_pretrained=from_pretrained)

    package = SimpleNamespace(
        AutoTokenizer=loads(Tokenizer(), "tokenizer"), UMT5EncoderModel=loads(Encoder(), "text_encoder")
    )
    monkeypatch.setitem(sys.modules, "transformers", package)
    small = replace(PRESETS["1.3b"].transformer, text_length=LENGTH, text_dim=WIDTH)
    monkeypatch.setitem(PRESETS, "1.3b", replace(PRESETS["1.3b"], transformer=small))
    return tmp_path / "wan"


def encode(out: Path, *settings: str, **job: Any) -> None:
    described = Job("encode-prompt", out, **job)
    run_job(described, resolve(described, list(settings)))


def test_the_states_of_both_prompts_are_written_and_padded_with_zeros(wan: Path) -> None:
    encode(wan / "prompt.safetensors", "positive=a sharp video", "null=blur", init=wan)
    states = load_file(wan / "prompt.safetensors")
    expected = {"positive": [1, 5, 5, 99, 0, 0], "null": [4, 99, 0, 0, 0, 0]}
    assert states.keys() == expected.keys()
    for name, tokens in expected.items():
        assert torch.equal(states[name].float(), torch.tensor(tokens).float()[:, None].expand(LENGTH, WIDTH))


def test_the_prompts_are_ours_and_the_one_that_wan_was_trained_to_be_led_away_from() -> None:
    assert resolve(Job("encode-prompt", Path()), []) == PromptConfig(POSITIVE, NULL)
    assert len(NULL.split(",")) == 28 and "，" not in NULL


def test_what_cannot_be_encoded_is_refused(wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "prompt.safetensors"
    short = ("positive=a", "null=b")
    with pytest.raises(UsageError, match="prompt of 7 tokens: `a b c d e f"):
        encode(out, "positive=a b c d e f", "null=b", init=wan)
    with pytest.raises(UsageError, match=r"needs a Wan2\.1 folder"):
        encode(out, *short)
    with pytest.raises(UsageError, match="makes no use of --data"):
        encode(out, *short, init=wan, data=(wan,))
    with pytest.raises(UsageError, match=r"not a \.safetensors file: `.*prompt`"):
        encode(tmp_path / "prompt", *short, init=wan)
    (wan / "text_encoder" / "damaged").touch()
    with pytest.raises(InputError, match=r"cannot read the text encoder in folder: `.*wan` \(no such weights\)"):
        encode(out, *short, init=wan)
    (wan / "text_encoder" / "damaged").unlink()
    small = PRESETS["1.3b"].transformer
    monkeypatch.setitem(PRESETS, "1.3b", replace(PRESETS["1.3b"], transformer=replace(small, text_dim=8)))
    with pytest.raises(InputError, match="its states are 4 wide, not 8"):
        encode(out, *short, init=wan)
    (wan / "tokenizer").rmdir()
    with pytest.raises(InputError, match="no `tokenizer` in folder") as caught:
        encode(out, *short, init=wan)
    assert "diffusers" in str(caught.value.hint)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match="package `transformers` is missing") as missing:
        encode(out, *short, init=wan)
    assert missing.value.hint == "pip install 'duovsr[train]'"
    assert not out.exists()
