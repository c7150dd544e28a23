"""A reward model: a number for an answer, learnt from which of two was preferred."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm_mm.models.preference import (
    check_pairs,
    document_sums,
    domain_sums,
    pair_measures,
    split_pairs,
)
from internlm_mm.ops import document_scores
from internlm_mm.registry import OBJECTIVES
from internlm_mm.structures import IGNORE_INDEX, Batch


@OBJECTIVES.register_module()
class PairwiseReward(nn.Module):
    """Bradley and Terry's loss: -log sigmoid(score of the chosen answer - score of the other one).

    A model with this objective has no head over the vocabulary. It has `score`, a vector, whose
    product with the output of the last layer at the last token of a conversation is the score, as
    in transformers' models for sequence classification.

    Args:
        center: Weight of the square of the two scores' sum, which draws scores to 0; the loss alone
            does not say where 0 is.

    Raises:
        ValueError: If `center` is negative.

    Source: https://arxiv.org/abs/2009.01325; centring, https://arxiv.org/abs/2312.09244.
    """

    takes_pairs = True
    replaces_head = True

    def __init__(self, center: float = 0.0) -> None:
        super().__init__()
        if center < 0:
            raise ValueError(f'model.objective.center={center} must not be negative')
        self.center = center
        self.score: nn.Linear | None = None
        self.document_scores = document_scores  # a seam

    def attach(self, hidden_size: int) -> None:
        """Make the score's weight, for a model of this width."""
        self.score = nn.Linear(hidden_size, 1, bias=False)

    def init_parameter(self, _name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Fill the score's weight; see `Decoder.init_parameter`."""
        tensor.normal_(0.0, 1 / math.sqrt(tensor.shape[1] + 1), generator=generator)

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Score of each document, [rows, max_docs]; anything for those that there are not.

        Args:
            hidden: Normalised output of the last layer, [rows, seq, hidden].
            batch: Says where documents end.
        """
        assert self.score is not None
        return self.document_scores(hidden, self.score.weight, batch.cu_seqlens)

    def forward(
        self, hidden: Tensor, head_weight: Tensor | None, batch: Batch
    ) -> dict[str, Tensor]:
        """Sum the loss of a micro-batch.

        Args:
            hidden: Normalised output of the last layer, [rows, seq, hidden].
            head_weight: None; there is no head.
            batch: Of pairs.

        Returns:
            Sums over pairs, float32 []: 'loss'; detached 'rewards/chosen', 'rewards/rejected',
            'rewards/margin' and 'rewards/accuracy'. With domains also 'domain_loss' and
            'domain_targets', counted in pairs.

        Raises:
            ValueError: If the batch is not of pairs.
        """
        assert head_weight is None
        check_pairs(self, batch)
        chosen, rejected = split_pairs(self.scores(hidden, batch))
        labelled = (batch.labels != IGNORE_INDEX).to(chosen.dtype)
        counted = split_pairs(document_sums(labelled, batch))[0] > 0
        losses = -F.logsigmoid(chosen - rejected)
        if self.center:
            losses = losses + self.center * (chosen + rejected).square()
        losses = losses.masked_fill(~counted, 0.0)
        measures = pair_measures(chosen.detach(), rejected.detach(), counted)
        return {'loss': losses.sum(), **measures, **domain_sums(losses, counted, batch)}
