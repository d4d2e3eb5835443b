"""The condition tokens of a preset, which need no text encoder: one prompt, and the null prompt of guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duovsr.options import TransformerConfig


class Prompt(nn.Module):
    """`positive` and `null` tokens, (text_length, text_dim) each: parameters, or buffers where they are not `learned`
    but a text encoder's states."""

    positive: Tensor
    null: Tensor

    def __init__(self, config: TransformerConfig, *, learned: bool = True) -> None:
        super().__init__()
        for name in ("positive", "null"):
            tokens = torch.randn(config.text_length, config.text_dim) * 0.02
            if learned:
                self.register_parameter(name, nn.Parameter(tokens))
            else:
                self.register_buffer(name, tokens)

    def tokens(self, batch: int, dropped: Tensor | None = None) -> Tensor:
        """(batch, L, text_dim); rows where `dropped` (batch,) bool is true get the null prompt."""
        positive = self.positive.expand(batch, -1, -1)
        if dropped is None:
            return positive
        return torch.where(dropped[:, None, None], self.null, positive)
