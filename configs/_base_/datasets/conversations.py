"""Your own conversations (json, jsonl, jsonl.gz or parquet), as they are.

OpenAI's messages, Alpaca, ShareGPT and prompt with answer are told by their keys
(docs/en/finetune.md). Files and sub-folders of the folder are domains, whose losses are logged
apart. Tokens are made when a run first needs them, below data/cache.
"""

from internlm_mm.datasets import ConversationDataset, EvalLoader, TokenLoader
from internlm_mm.tokenizers import SentencePieceTokenizer

tokenizer = dict(type=SentencePieceTokenizer, path='data/chat/tokenizer')
train_dataloader = dict(
    type=TokenLoader,
    dataset=dict(
        type=ConversationDataset,
        path='data/chat/train',
        seq_len=4096,
        chat_template='internlm2',  # chat and export find it in the checkpoint's config
        packing='best_fit',  # whole conversations a row; None: one each; 'documents': cut
        overlong='split',  # before a user's turn; or 'truncate', 'error'
        on_error='raise',  # 'skip' leaves malformed records out and counts them
    ),
    num_workers=2,
)
val_dataloader = dict(
    type=EvalLoader,
    dataset=dict(
        type=ConversationDataset,
        path='data/chat/validation',
        seq_len=4096,
        chat_template='internlm2',
        shuffle=False,
    ),
    micro_batch_size=2,  # rows
    max_rows=1024,  # evenly spread
)
