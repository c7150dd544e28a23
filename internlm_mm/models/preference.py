"""Objectives of alignment: of two answers to a prompt, the chosen one is to become likelier."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internlm_mm.ops import linear_token_losses
from internlm_mm.registry import OBJECTIVES
from internlm_mm.structures import IGNORE_INDEX, Batch
from internlm_mm.utils.suggest import did_you_mean

TokenLosses = Callable[..., Tensor]
"""As `linear_token_losses`."""

REFERENCES = ('adapters_off', 'precomputed')
"""Where an objective has the frozen model's log-probabilities from."""


class Pairs(NamedTuple):
    """What a model says of the pairs of a micro-batch.

    Attributes:
        chosen: Log-probability of each chosen answer, [rows, pairs].
        rejected: Of each rejected one, [rows, pairs].
        chosen_lengths: Tokens of each chosen answer, at least 1, [rows, pairs].
        rejected_lengths: Of each rejected one, [rows, pairs].
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


class PairObjective(nn.Module):
    """What all objectives over pairs of answers share: log-probabilities, sums and measures.

    A batch holds documents in pairs, first the chosen answer behind its prompt; its divisor counts
    pairs. A subclass says in `pair_losses` what a pair's loss is, and in `rewards` what its answers
    are worth.

    Args:
        reference: Whether and where a frozen model's log-probabilities come from, one of
            `REFERENCES`; None where the loss needs none.
        sft_weight: Share of the chosen answer's own loss, per token, that is added.
        chunk_tokens: Tokens whose logits are held in memory at a time; None for 1024.

    Raises:
        ValueError: If an argument is out of its range.
    """

    takes_pairs = True

    def __init__(
        self, reference: str | None, sft_weight: float = 0.0, chunk_tokens: int | None = None
    ) -> None:
        super().__init__()
        if reference is not None and reference not in REFERENCES:
            hint = did_you_mean(str(reference), REFERENCES)
            raise ValueError(
                f'model.objective.reference={reference!r} is none of {", ".join(REFERENCES)}.{hint}'
            )
        if sft_weight < 0:
            raise ValueError(f'model.objective.sft_weight={sft_weight} must not be negative')
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f'model.objective.chunk_tokens={chunk_tokens} must be at least 1')
        self.reference, self.sft_weight, self.chunk_tokens = reference, sft_weight, chunk_tokens
        self.tells_log_probs = False
        # The seam: tensor parallelism replaces it.
        self.token_losses: TokenLosses = linear_token_losses

    @property
    def reads_adapters_off(self) -> bool:
        """Whether a batch needs what the model says without its adapters."""
        return self.reference == 'adapters_off' and not self.tells_log_probs

    @contextmanager
    def telling_log_probs(self) -> Iterator[None]:
        """Inside, `forward` gives 'log_probs' of every document, [rows, max_docs], and no loss."""
        self.tells_log_probs = True
        try:
            yield
        finally:
            self.tells_log_probs = False

    def forward(self, hidden: Tensor, head_weight: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sum the loss of a micro-batch.

        Args:
            hidden: Normalised output of the last layer, [rows, seq, hidden].
            head_weight: [vocab, hidden].
            batch: Of pairs; with `references` where the loss needs a frozen model.

        Returns:
            Sums over pairs, float32 []: 'loss'; detached 'rewards/chosen', 'rewards/rejected',
            'rewards/margin', 'rewards/accuracy', 'log_probs/chosen', 'log_probs/rejected' and, with
            a frozen model, 'kl'. With domains also 'domain_loss' and 'domain_targets', as of
            `NextToken`, counted in pairs.

        Raises:
            ValueError: If the batch is not of pairs, or lacks what the frozen model says.
        """
        check_pairs(self, batch)
        log_probs, lengths = self.log_probs(hidden, head_weight, batch)
        if self.tells_log_probs:
            return {'log_probs': log_probs.detach()}
        policy = Pairs(*split_pairs(log_probs), *split_pairs(lengths.clamp(min=1)))
        reference = None
        if self.reference is not None:
            if batch.references is None:
                raise ValueError(
                    f'{type(self).__name__}: there is nothing of a frozen model. reference='
                    "'precomputed' needs the hook ReferenceHook in the config; a model with "
                    "adapters can do without: reference='adapters_off'"
                )
            references = batch.references.to(log_probs.dtype)
            reference = Pairs(
                *split_pairs(references), policy.chosen_lengths, policy.rejected_lengths
            )
        counted = split_pairs(lengths)[0] > 0  # rows are filled up with empty pairs
        losses = self.pair_losses(policy, reference)
        if self.sft_weight:
            losses = losses - self.sft_weight * policy.chosen / policy.chosen_lengths
        losses = losses.masked_fill(~counted, 0.0)
        with torch.no_grad():
            rewards = self.rewards(policy, reference)
            measures = pair_measures(*rewards, counted)
            measures['log_probs/chosen'] = policy.chosen.masked_fill(~counted, 0.0).sum()
            measures['log_probs/rejected'] = policy.rejected.masked_fill(~counted, 0.0).sum()
            if reference is not None:
                # The mean of both answers' log-ratios: an estimate on the data's answers.
                ratios = policy.chosen - reference.chosen + policy.rejected - reference.rejected
                measures['kl'] = (ratios / 2).masked_fill(~counted, 0.0).sum()
        return {'loss': losses.sum(), **measures, **domain_sums(losses, counted, batch)}

    def log_probs(self, hidden: Tensor, head_weight: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probability of each document's labels, and how many it has, [rows, max_docs]."""
        labels = batch.labels.flatten()
        losses = self.token_losses(hidden.flatten(0, -2), head_weight, labels, self.chunk_tokens)
        labelled = (labels != IGNORE_INDEX).to(losses.dtype)
        shape = batch.labels.shape
        return (
            document_sums(-losses.view(shape), batch),
            document_sums(labelled.view(shape), batch),
        )

    def pair_losses(self, policy: Pairs, reference: Pairs | None) -> Tensor:
        """Loss of each pair, [rows, pairs]; what is computed of empty pairs does not count."""
        raise NotImplementedError

    def rewards(self, policy: Pairs, reference: Pairs | None) -> tuple[Tensor, Tensor]:
        """What the chosen and the rejected answers are worth, [rows, pairs] each."""
        raise NotImplementedError


@OBJECTIVES.register_module()
class DPO(PairObjective):
    """Direct preference optimisation: -log sigmoid(beta * (log-ratio chosen - log-ratio rejected)).

    The log-ratio of an answer is the policy's log-probability less that of the model it began as.

    Args:
        beta: How dear it is to leave that model: the higher, the closer the policy stays.
        reference: 'adapters_off' asks the model without its adapters, a second forward; with
            'precomputed' rows carry what it said before training (`ReferenceHook`).
        label_smoothing: Share of the preferences that may be the wrong way round, in [0, 0.5):
            conservative DPO.
        average_log_prob: Whether log-ratios are divided by the length of their answers, so that
            long answers weigh no more than short ones (the length-normalised DPO of Tulu 3).
        sft_weight: Weight of the chosen answer's own loss, per token (the NLL term of RPO).
        chunk_tokens: Tokens whose logits are held in memory at a time; None for 1024.

    Source: https://arxiv.org/abs/2305.18290; conservative DPO,
    https://ericmitchell.ai/cdpo.pdf; length-normalised, https://arxiv.org/abs/2411.15124;
    the NLL term, https://arxiv.org/abs/2404.19733.
    """

    def __init__(
        self,
        beta: float = 0.1,
        reference: str = 'adapters_off',
        label_smoothing: float = 0.0,
        average_log_prob: bool = False,
        sft_weight: float = 0.0,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(_named(reference), sft_weight, chunk_tokens)
        _check_positive(beta=beta)
        if not 0.0 <= label_smoothing < 0.5:
            raise ValueError(
                f'model.objective.label_smoothing={label_smoothing} is not in [0, 0.5)'
            )
        self.beta, self.label_smoothing = beta, label_smoothing
        self.average_log_prob = average_log_prob

    def pair_losses(self, policy: Pairs, reference: Pairs | None) -> Tensor:
        """See `PairObjective`."""
        chosen, rejected = self.rewards(policy, reference)
        losses = -F.logsigmoid(chosen - rejected)
        if self.label_smoothing:
            losses = torch.lerp(losses, -F.logsigmoid(rejected - chosen), self.label_smoothing)
        return losses

    def rewards(self, policy: Pairs, reference: Pairs | None) -> tuple[Tensor, Tensor]:
        """Beta times the log-ratio."""
        chosen, rejected = _log_ratios(policy, reference, self.average_log_prob)
        return self.beta * chosen, self.beta * rejected


@OBJECTIVES.register_module()
class IPO(PairObjective):
    """Identity preference optimisation: the square of what the margin lacks of 1 / (2 * beta).

    Unlike DPO's its loss has a minimum, so that the margin does not grow for ever.

    Args:
        beta: The higher, the smaller the margin that is aimed at; tau of the paper.
        reference: As of `DPO`.
        average_log_prob: Whether log-ratios are divided by the length of their answers, as the
            authors and TRL do; the paper's formula has sums.
        sft_weight: As of `DPO`.
        chunk_tokens: Tokens whose logits are held in memory at a time; None for 1024.

    Source: https://arxiv.org/abs/2310.12036.
    """

    def __init__(
        self,
        beta: float = 0.1,
        reference: str = 'adapters_off',
        average_log_prob: bool = True,
        sft_weight: float = 0.0,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(_named(reference), sft_weight, chunk_tokens)
        _check_positive(beta=beta)
        self.beta, self.average_log_prob = beta, average_log_prob

    def pair_losses(self, policy: Pairs, reference: Pairs | None) -> Tensor:
        """See `PairObjective`."""
        chosen, rejected = _log_ratios(policy, reference, self.average_log_prob)
        return (chosen - rejected - 1 / (2 * self.beta)).square()

    def rewards(self, policy: Pairs, reference: Pairs | None) -> tuple[Tensor, Tensor]:
        """Beta times the log-ratio, of whole answers or per token as in the loss."""
        chosen, rejected = _log_ratios(policy, reference, self.average_log_prob)
        return self.beta * chosen, self.beta * rejected


@OBJECTIVES.register_module()
class SimPO(PairObjective):
    """Simple preference optimisation: mean log-probabilities per token and no frozen model.

    The loss is -log sigmoid(beta * (mean chosen - mean rejected) - gamma).

    Args:
        beta: Scale of the rewards.
        gamma: By how much the chosen reward is to exceed the rejected one.
        sft_weight: As of `DPO`.
        chunk_tokens: Tokens whose logits are held in memory at a time; None for 1024.

    Source: https://arxiv.org/abs/2405.14734.
    """

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 1.0,
        sft_weight: float = 0.0,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(None, sft_weight, chunk_tokens)
        _check_positive(beta=beta)
        if gamma < 0:
            raise ValueError(f'model.objective.gamma={gamma} must not be negative')
        self.beta, self.gamma = beta, gamma

    def pair_losses(self, policy: Pairs, reference: Pairs | None) -> Tensor:
        """See `PairObjective`."""
        chosen, rejected = self.rewards(policy, reference)
        return -F.logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, policy: Pairs, reference: Pairs | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Beta times the mean log-probability of a token."""
        return (
            self.beta * policy.chosen / policy.chosen_lengths,
            self.beta * policy.rejected / policy.rejected_lengths,
        )


def check_pairs(objective: nn.Module, batch: Batch) -> None:
    """Refuse rows of anything but pairs, and shares of rows.

    Raises:
        ValueError: Naming the objective, and the dataset that it needs.
    """
    name = type(objective).__name__
    if not batch.is_paired:
        raise ValueError(
            f'model.objective: {name} compares two answers, and the data has single documents: '
            'use dataset=dict(type=PreferenceDataset, ...)'
        )
    if batch.own_positions is not None:
        raise ValueError(
            f'model.objective: {name} needs whole answers on a rank: strategy.parallel.context=1'
        )


def document_sums(values: Tensor, batch: Batch) -> Tensor:
    """Sum of the values of each document's tokens, [rows, seq] -> [rows, max_docs]."""
    zeros = values.new_zeros(len(values), batch.cu_seqlens.shape[1] - 1)
    return zeros.scatter_add(1, batch.document_ids.long(), values)


def split_pairs(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Of chosen and of rejected answers, [rows, pairs] each, from [rows, max_docs]."""
    pairs = documents.shape[1] // 2
    both = documents[:, : 2 * pairs].unflatten(1, (pairs, 2))
    return both[..., 0], both[..., 1]


def pair_measures(chosen: Tensor, rejected: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Sums over pairs of rewards, of their difference, and of whether it is above 0.

    Args:
        chosen: Rewards, [rows, pairs].
        rejected: Rewards, [rows, pairs].
        counted: Which pairs there are, [rows, pairs].
    """
    found = {
        'rewards/chosen': chosen,
        'rewards/rejected': rejected,
        'rewards/margin': chosen - rejected,
        'rewards/accuracy': (chosen > rejected).to(chosen.dtype),
    }
    return {key: value.masked_fill(~counted, 0.0).sum() for key, value in found.items()}


def domain_sums(losses: Tensor, counted: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Loss and number of the pairs of each domain; nothing where domains are not told apart.

    Args:
        losses: Of pairs, 0 where there is none, [rows, pairs].
        counted: Which pairs there are, [rows, pairs].
        batch: Whose rows have a domain each.
    """
    if batch.domain_ids is None:
        return {}
    zeros = losses.new_zeros(batch.num_domains)
    domains = batch.domain_ids[:, 0]
    return {
        'domain_loss': zeros.index_add(0, domains, losses.detach().sum(1)),
        'domain_targets': zeros.index_add(0, domains, counted.to(losses.dtype).sum(1)),
    }


def _log_ratios(
    policy: Pairs, reference: Pairs | None, average_log_prob: bool
) -> tuple[Tensor, Tensor]:
    assert reference is not None
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    if average_log_prob:
        return chosen / policy.chosen_lengths, rejected / policy.rejected_lengths
    return chosen, rejected


def _named(reference: str) -> str:
    if reference is None:
        raise ValueError(
            f'model.objective.reference=None: one of {", ".join(REFERENCES)} is needed'
        )
    return reference


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f'model.objective.{name}={value} must be above 0')
