"""What is summed into the loss: a module that gets hidden states and the head's weight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from internlm_mm.ops import greedy_tokens, linear_cross_entropy
from internlm_mm.registry import OBJECTIVES
from internlm_mm.structures import IGNORE_INDEX, Batch
from internlm_mm.utils.loss_chunk import loss_chunk

CrossEntropy = Callable[..., tuple[Tensor, Tensor | None]]
"""As `linear_cross_entropy`; None in place of the losses of single tokens where it has none."""


@OBJECTIVES.register_module()
class NextToken(nn.Module):
    """Cross-entropy of the next token, summed over labelled tokens.

    Args:
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1). It is
            applied in training only, so that evaluation reports the plain loss.
        chunk_tokens: Tokens whose logits are held in memory at a time; None as many as suit the
            device (`utils/loss_chunk.py`).

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, label_smoothing: float = 0.0, chunk_tokens: int | None = None) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f'model.objective.label_smoothing={label_smoothing} is not in [0, 1)')
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f'model.objective.chunk_tokens={chunk_tokens} must be at least 1')
        self.label_smoothing = label_smoothing
        self.chunk_tokens = chunk_tokens
        # The seams: kernels and tensor parallelism replace them.
        self.cross_entropy: CrossEntropy = linear_cross_entropy
        self.greedy_tokens: Callable[..., Tensor] = greedy_tokens

    def forward(self, hidden: Tensor, head_weight: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Sum the loss of a micro-batch.

        Args:
            hidden: Normalised output of the last layer, [rows, seq, hidden].
            head_weight: [vocab, hidden].
            batch: Gives labels and, if told apart, domains.

        Returns:
            'loss', float32 []; with domains also 'domain_loss' and 'domain_targets', sums over
            each domain's labelled tokens, float32 [num_domains], detached. In evaluation mode
            also 'correct', how many labels are the likeliest token, and with domains
            'domain_correct'.
        """
        if batch.is_paired:
            raise ValueError(
                'model.objective: NextToken learns every answer, and the data has pairs of which '
                'one was preferred: use objective=dict(type=DPO) or another one of pairs'
            )
        labels = batch.labels.flatten()
        loss, token_losses = self.cross_entropy(
            hidden.flatten(0, -2),
            head_weight,
            labels,
            self.label_smoothing if self.training else 0.0,
            self.chunk_tokens,
        )
        outputs = {'loss': loss}
        if not self.training:
            right = self._is_right(hidden.flatten(0, -2), head_weight, labels).to(loss.dtype)
            outputs['correct'] = right.sum()
        if batch.domain_ids is not None:
            if token_losses is None:
                raise ValueError(
                    'losses by domain need the loss of each token, which this cross-entropy does '
                    "not tell: set strategy.kernels.cross_entropy='torch'"
                )
            domains = batch.domain_ids.flatten()
            zeros = token_losses.new_zeros(batch.num_domains)
            counted = (labels != IGNORE_INDEX).to(token_losses.dtype)
            outputs['domain_loss'] = zeros.index_add(0, domains, token_losses)
            outputs['domain_targets'] = zeros.index_add(0, domains, counted)
            if not self.training:
                outputs['domain_correct'] = zeros.index_add(0, domains, right)
        return outputs

    def _is_right(self, hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
        """Whether each label is the likeliest token, [tokens], bool."""
        chunk = loss_chunk(self.chunk_tokens, in_place=False)
        return self.greedy_tokens(hidden, head_weight, chunk) == labels
