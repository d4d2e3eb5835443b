"""The prompts through Wan2.1's text encoder, once: what `prompt.safetensors` holds. Inference needs no text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from duovsr.errors import InputError, UsageError
from duovsr.options import TransformerConfig
from duovsr.weights import atomic_file

# The paper names no prompt: ours, plain words for what super-resolution is to give.
POSITIVE = (
    "High quality video, sharp focus, crisp edges, fine natural detail, realistic textures, natural colors, clean,"
    " clear, high resolution."
)
# Wan2.1's own negative prompt (wan/configs/shared_config.py, `sample_neg_prompt`), which its guidance uses in place of
# an empty one; with the commas that are left of it when its tokenizer has cleaned it.
NULL = (
    "色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止,整体发灰,最差质量,低质量,JPEG压缩残留,丑陋的,残缺的,"
    "多余的手指,画得不好的手部,画得不好的脸部,畸形的,毁容的,形态畸形的肢体,手指融合,静止不动的画面,杂乱的背景,三条腿,"
    "背景人很多,倒着走"
)


@dataclass(frozen=True)
class PromptConfig:
    """The two texts: what is asked for, and what guidance leads away from."""

    positive: str = POSITIVE
    null: str = NULL


def encode_prompt(folder: Path, out: Path, text: TransformerConfig, config: PromptConfig) -> None:
    """Write the states of both prompts, (text_length, text_dim) each, to the safetensors file `out`.

    `folder`: Wan2.1 in the layout of diffusers, with `text_encoder/` and `tokenizer/`. Raises UsageError without
    transformers, InputError.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"not a .safetensors file: `{out}`", hint="use `--out prompt.safetensors`")
    tokenizer, encoder = _load(folder)
    prompts = {"positive": config.positive, "null": config.null}
    states = {name: _encode(tokenizer, encoder, prompt, text) for name, prompt in prompts.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out) as partial:
        save_file(states, partial)


def _load(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ModuleNotFoundError as error:
        raise UsageError(f"package `{error.name}` is missing", hint="pip install 'duovsr[train]'") from error
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            hint = "take a Wan2.1 folder in the layout of diffusers, with text_encoder/ and tokenizer/"
            raise InputError(f"no `{part}` in folder: `{folder}`", hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True, dtype=torch.bfloat16)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot read the text encoder in folder: `{folder}` ({reason})") from error
    return tokenizer, encoder.eval()


@torch.inference_mode()
def _encode(tokenizer: Any, encoder: Any, prompt: str, text: TransformerConfig) -> Tensor:
    """(text_length, text_dim), zeros after the prompt. Encoded without padding, which Wan2.1 masks in the encoder."""
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    if tokens.shape[1] > text.text_length:
        raise UsageError(f"prompt of {tokens.shape[1]} tokens: `{prompt[:40]}...`", hint=f"use {text.text_length}")
    states: Tensor = encoder(tokens).last_hidden_state[0]
    if states.shape[1] != text.text_dim:
        raise InputError(f"not Wan2.1's text encoder: its states are {states.shape[1]} wide, not {text.text_dim}")
    return F.pad(states, (0, 0, 0, text.text_length - len(states)))
