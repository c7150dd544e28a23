"""Text to token ids and back, and conversations to text."""

from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_parsing import Answer, CallError, read_answer, read_answer_ids
from internlm_mm.tokenizers.chat_spelling import Encoded, Segment, ToolFormat
from internlm_mm.tokenizers.chat_stream import AnswerStream
from internlm_mm.tokenizers.chat_templates import (
    build_template,
    chatml,
    internlm,
    internlm2,
    internlm3,
    internlm_v1_1,
    llama3,
)
from internlm_mm.tokenizers.hf_tokenizer import HFTokenizer
from internlm_mm.tokenizers.load import load_tokenizer
from internlm_mm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

__all__ = [
    'Answer',
    'AnswerStream',
    'CallError',
    'ChatTemplate',
    'Encoded',
    'HFTokenizer',
    'Segment',
    'SentencePieceTokenizer',
    'Tokenizer',
    'ToolFormat',
    'build_template',
    'chatml',
    'internlm',
    'internlm2',
    'internlm3',
    'internlm_v1_1',
    'llama3',
    'load_tokenizer',
    'read_answer',
    'read_answer_ids',
]
