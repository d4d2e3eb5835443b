"""The condition tokens of a preset without a text encoder: one learned prompt and the null prompt of guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from duovsr.options import TransformerConfig


class Prompt(nn.Module):
    """`positive` and `null` tokens, (text_length, text_dim) each. `1.3b` stores text-encoder states here instead."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.randn(config.text_length, config.text_dim) * 0.02)
        self.null = nn.Parameter(torch.randn(config.text_length, config.text_dim) * 0.02)

    def tokens(self, batch: int, dropped: Tensor | None = None) -> Tensor:
        """(batch, L, text_dim); rows where `dropped` (batch,) bool is true get the null prompt."""
        positive = self.positive.expand(batch, -1, -1)
        if dropped is None:
            return positive
        return torch.where(dropped[:, None, None], self.null, positive)
