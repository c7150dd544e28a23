"""Finished models at work."""

from internlm_mm.inference.chat import Chat
from internlm_mm.inference.generator import Generator
from internlm_mm.inference.sampling import Sampling
from internlm_mm.inference.template_choice import stored_template, template_for

__all__ = ['Chat', 'Generator', 'Sampling', 'stored_template', 'template_for']
