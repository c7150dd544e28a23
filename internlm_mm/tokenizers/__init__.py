"""Text to token ids and back."""

from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.hf_tokenizer import HFTokenizer
from internlm_mm.tokenizers.load import load_tokenizer
from internlm_mm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = ['HFTokenizer', 'SentencePieceTokenizer', 'Tokenizer', 'load_tokenizer']
