"""InternLM's training system as MMEngine plugins: pre-train, fine-tune, convert and serve."""

from internlm_mm.version import __version__

__all__ = ['__version__']
