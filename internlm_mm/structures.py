"""The one record that travels from the data to the loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that is not trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch of one data rank. Shapes are fixed; what varies is padded.

    Attributes:
        input_ids: Tokens, [rows, seq], int64.
        labels: The token each position must predict, already shifted, `IGNORE_INDEX` where
            nothing is trained, [rows, seq], int64.
        position_ids: Position of each token inside its own document, [rows, seq], int64.
        document_ids: Which document of its row a token belongs to, counted from 0,
            [rows, seq], int32. Tokens attend only to earlier tokens of the same document.
        cu_seqlens: Where documents start and end in their row, [rows, max_docs + 1], int32;
            begins with 0, padded at the end with seq. Two columns mean one document a row.
        max_seqlen: Tokens in the longest document; an int, so that no kernel has to ask the device.
        num_targets: Positions with a label, over the whole micro-batch, or pairs of answers where
            there are some; an int for the same reason. It counts in the objective's own unit and is
            summed over ranks to give the step's divisor.
        domain_ids: Data domain of each token, [rows, seq], int64, or None when domains are not
            told apart.
        num_domains: How many domains there are; 0 when `domain_ids` is None.
        own_positions: Which tokens of their rows `input_ids` are, [seq], int64, where ranks share
            rows; None when they are all. `document_ids` and `cu_seqlens` are then of whole rows.
        is_paired: Whether documents come in pairs, an answer that was chosen and behind it one that
            was rejected. `num_targets` then counts pairs.
        references: Log-probability of each document's labels under another model,
            [rows, max_docs], float32; None when it is not known.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_targets: int
    domain_ids: Tensor | None = None
    num_domains: int = 0
    own_positions: Tensor | None = None
    is_paired: bool = False
    references: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """All positions, trained or not: what speed is counted in."""
        return self.input_ids.numel()

    def document_lengths(self) -> Tensor:
        """How many tokens the document of each token has, [rows, seq], int32."""
        lengths = self.cu_seqlens.diff().gather(1, self.document_ids.long())
        if self.own_positions is None:
            return lengths
        return lengths.index_select(1, self.own_positions)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory. `torch.utils.data.DataLoader` calls this."""
        return self._map(Tensor.pin_memory)

    def _map(self, function) -> Batch:
        tensors = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)
