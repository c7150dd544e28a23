"""Model families and the decoder they share."""

from internlm_mm.models.decoder import Decoder, DecoderLayer
from internlm_mm.models.family import Family
from internlm_mm.models.internlm import InternLM
from internlm_mm.models.internlm2 import InternLM2
from internlm_mm.models.internlm3 import InternLM3
from internlm_mm.models.llama import Llama
from internlm_mm.models.lora import LoRA
from internlm_mm.models.mistral import Mistral
from internlm_mm.models.objectives import NextToken
from internlm_mm.models.preference import DPO, IPO, SimPO
from internlm_mm.models.qwen2 import Qwen2
from internlm_mm.models.qwen3 import Qwen3
from internlm_mm.models.reward import PairwiseReward

__all__ = [
    'DPO',
    'IPO',
    'Decoder',
    'DecoderLayer',
    'Family',
    'InternLM',
    'InternLM2',
    'InternLM3',
    'Llama',
    'LoRA',
    'Mistral',
    'NextToken',
    'PairwiseReward',
    'Qwen2',
    'Qwen3',
    'SimPO',
]
