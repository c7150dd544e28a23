"""The evaluation pass over pairs of answers."""

from collections.abc import Mapping
from typing import Any

from internlm_mm.engine.loops import PerplexityLoop
from internlm_mm.registry import LOOPS


@LOOPS.register_module()
class PreferenceLoop(PerplexityLoop):
    """What an objective over pairs measures on held-out pairs, over all and the loss by domain.

    Means over pairs: neither the number of ranks nor the size of batches changes the result beyond
    rounding.

    Args:
        runner: Owns strategy and hooks.
        dataloader: Config of a loader that passes once over a dataset of pairs, or a built one.
        evaluator: Must be None; MMEngine's signature.
        tasks: As of `PerplexityLoop`.
        task_batch_size: Likewise.
    """

    takes_pairs = True

    def _metrics(self, means: Mapping[str, Any]) -> dict[str, float]:
        """'loss', 'loss/NAME', and what the objective tells besides: 'rewards/accuracy' ..."""
        return {key.replace('domain_loss/', 'loss/'): float(value) for key, value in means.items()}
