"""Random tokens, for speed runs: needs no tokenizer and no files, and teaches nothing."""

from internlm_mm.datasets import RandomTokens, TokenLoader

train_dataloader = dict(
    type=TokenLoader,
    dataset=dict(
        type=RandomTokens,
        vocab_size=103_168,
        seq_len=4096,
        document_lengths=None,  # one document a row; [512, 1024, 4096] packs documents instead
    ),
    num_workers=2,
)
