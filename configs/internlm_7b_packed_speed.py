"""InternLM-7B on rows that are packed with random documents: what masks between them cost.

torchrun --nproc-per-node 2 -m internlm_mm benchmark internlm_7b_packed_speed --launcher pytorch

Logarithms of lengths are normal: half of the documents are shorter than 560 tokens, the mean is
865, and none is longer than a row.
"""

from mmengine.config import read_base

with read_base():
    from .internlm_7b_speed import *

# The middles of 32 equal shares of exp(N(6.3, 1)) + 16 tokens.
train_dataloader.dataset.update(document_lengths=[
    79, 117, 147, 175, 201, 227, 253, 279, 307, 335, 364, 395, 428, 463, 500, 539,
    582, 628, 679, 734, 796, 865, 944, 1034, 1139, 1265, 1419, 1615, 1878, 2264, 2926, 4096,
])  # fmt: skip
