"""The source of Python's standard library, which `make demo` tokenises into data/python_stdlib."""

from internlm_mm.datasets import EvalLoader, PretrainDataset, TokenLoader
from internlm_mm.tokenizers import SentencePieceTokenizer

tokenizer = dict(type=SentencePieceTokenizer, path='data/python_stdlib/tokenizer')
train_dataloader = dict(
    type=TokenLoader,
    dataset=dict(
        type=PretrainDataset,
        data_root='data/python_stdlib/tokens/train',
        seq_len=512,
    ),
)
val_dataloader = dict(
    type=EvalLoader,
    dataset=dict(
        type=PretrainDataset,
        data_root='data/python_stdlib/tokens/validation',
        seq_len=512,
        shuffle=False,
    ),
    micro_batch_size=8,  # rows
)
