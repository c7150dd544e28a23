"""A strategy with matrix products in 8 bits (docs/en/kernels.md); import it after another config.

Needs a GPU of compute capability 8.9 or newer and `pip install 'internlm_mm[fp8]'`. Embedding,
head, norms, attention, masters, gradients and optimizer keep their precision.
"""

from internlm_mm.parallel import HybridParallelStrategy

strategy = dict(
    type=HybridParallelStrategy,
    precision=dict(param='bfloat16', reduce='float32'),
    compile=True,  # or rounding would cost more than the products gain
    float8=dict(recipe='tensorwise'),  # one scale a tensor; weights are gathered in 8 bits
)
