"""Your own preferences (json, jsonl, jsonl.gz or parquet): prompts with two answers each.

Their forms are told by their keys (docs/en/preference.md). Files and sub-folders of the folder are
domains, whose losses are logged apart. Tokens are made when a run first needs them, below
data/cache.
"""

from internlm_mm.datasets import EvalLoader, PreferenceDataset, TokenLoader
from internlm_mm.tokenizers import SentencePieceTokenizer

tokenizer = dict(type=SentencePieceTokenizer, path='data/preferences/tokenizer')
train_dataloader = dict(
    type=TokenLoader,
    dataset=dict(
        type=PreferenceDataset,
        path='data/preferences/train',
        seq_len=4096,  # both answers of a pair, with their prompts
        chat_template='internlm2',  # the one that the model was fine-tuned with
        packing='best_fit',  # several pairs a row; None: one each
        overlong='error',  # of a pair longer than a row; 'truncate' cuts it, 'skip' leaves it out
        on_error='raise',  # 'skip' leaves malformed records out and counts them
    ),
    num_workers=2,
)
val_dataloader = dict(
    type=EvalLoader,
    dataset=dict(
        type=PreferenceDataset,
        path='data/preferences/validation',
        seq_len=4096,
        chat_template='internlm2',
        shuffle=False,
    ),
    micro_batch_size=2,  # rows
    max_rows=1024,  # evenly spread
)
