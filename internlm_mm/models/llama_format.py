"""Families that Hugging Face loads as a plain `LlamaForCausalLM`, without remote code."""

from internlm_mm.models.decoder import Decoder


class LlamaFormat(Decoder):
    """A decoder whose forms in Hugging Face folders are told by `hf_forms`."""
