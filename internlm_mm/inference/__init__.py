"""Finished models at work."""

from internlm_mm.inference.chat import Chat, ChatPrompts
from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling
from internlm_mm.inference.template_choice import stored_template, template_for
from internlm_mm.inference.text_stream import Written

__all__ = [
    'Chat',
    'ChatPrompts',
    'Generator',
    'Sampling',
    'Written',
    'stored_template',
    'template_for',
]
