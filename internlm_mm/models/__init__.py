"""Model families and the decoder they share."""

from internlm_mm.models.decoder import Decoder, DecoderLayer
from internlm_mm.models.internlm import InternLM
from internlm_mm.models.llama import Llama
from internlm_mm.models.objectives import NextToken

__all__ = ['Decoder', 'DecoderLayer', 'InternLM', 'Llama', 'NextToken']
