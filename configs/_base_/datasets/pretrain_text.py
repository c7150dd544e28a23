"""Your own text (txt, json, jsonl, jsonl.gz or parquet), which two commands turn into data/text.

    python tools/train_tokenizer.py TEXTS --output data/text/tokenizer --vocab-size 103168
    python tools/preprocess_data.py TEXTS --output data/text/tokens \
        --tokenizer data/text/tokenizer --validation-fraction 0.001

Sub-folders of TEXTS become domains, whose losses are logged apart.
"""

from internlm_mm.datasets import EvalLoader, PretrainDataset, TokenLoader
from internlm_mm.tokenizers import SentencePieceTokenizer

tokenizer = dict(type=SentencePieceTokenizer, path='data/text/tokenizer')
train_dataloader = dict(
    type=TokenLoader,
    dataset=dict(
        type=PretrainDataset,
        data_root='data/text/tokens/train',
        seq_len=4096,
        weights=None,  # by size; dict(web=0.7, code=0.3) mixes sub-folders in these proportions
        min_document_length=32,  # tokens
    ),
    num_workers=4,
)
val_dataloader = dict(
    type=EvalLoader,
    dataset=dict(
        type=PretrainDataset,
        data_root='data/text/tokens/validation',
        seq_len=4096,
        shuffle=False,
    ),
    micro_batch_size=2,  # rows
    max_rows=1024,  # evenly spread
    num_workers=2,
)
