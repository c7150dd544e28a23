"""Text on disk -> rows of tokens -> batches."""

from internlm_mm.datasets.conversation import ConversationDataset
from internlm_mm.datasets.internlm_bin import InternLMBinDataset
from internlm_mm.datasets.loader import EvalLoader, TokenLoader
from internlm_mm.datasets.mixture import Mixture
from internlm_mm.datasets.packing import Row, collate_rows, pack_row
from internlm_mm.datasets.preference import PreferenceDataset
from internlm_mm.datasets.pretrain import PretrainDataset
from internlm_mm.datasets.random_pairs import RandomPairs
from internlm_mm.datasets.random_tokens import RandomTokens
from internlm_mm.datasets.sampler import BatchSizeRampup
from internlm_mm.datasets.token_file import TokenFile
from internlm_mm.datasets.token_writer import TokenFileWriter

__all__ = [
    'BatchSizeRampup',
    'ConversationDataset',
    'EvalLoader',
    'InternLMBinDataset',
    'Mixture',
    'PreferenceDataset',
    'PretrainDataset',
    'RandomPairs',
    'RandomTokens',
    'Row',
    'TokenFile',
    'TokenFileWriter',
    'TokenLoader',
    'collate_rows',
    'pack_row',
]
