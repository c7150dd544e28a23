"""Small models and batches for the tests of this folder."""

import torch
from torch import nn

from internlm_mm.structures import IGNORE_INDEX, Batch

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    max_seq_len=64,
)


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Weights that make every part of a model matter, biases and norms included."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, std, generator=generator)
    return model


def make_batch(lengths: list[list[int]], vocab_size: int = 128, domains: int = 0) -> Batch:
    """Rows of documents of the given lengths; the last position of a document has no label."""
    seq = sum(lengths[0])
    widest = max(map(len, lengths))
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(vocab_size, (len(lengths), seq), generator=generator)
    labels = input_ids.roll(-1, 1)
    cu_seqlens = torch.full((len(lengths), widest + 1), seq, dtype=torch.int32)
    position_ids, document_ids = torch.empty_like(input_ids), torch.empty_like(input_ids)
    for row, sizes in enumerate(lengths):
        start = 0
        for index, size in enumerate(sizes):
            cu_seqlens[row, index] = start
            position_ids[row, start : start + size] = torch.arange(size)
            document_ids[row, start : start + size] = index
            start += size
            labels[row, start - 1] = IGNORE_INDEX
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        document_ids=document_ids.int(),
        cu_seqlens=cu_seqlens,
        max_seqlen=max(map(max, lengths)),
        num_targets=int((labels != IGNORE_INDEX).sum()),
        domain_ids=document_ids % domains if domains else None,
        num_domains=domains,
    )
