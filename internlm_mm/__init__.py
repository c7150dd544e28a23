"""InternLM's training system as MMEngine plugins: pre-train, fine-tune, convert and serve."""

from internlm_mm.utils.installation import check_mmengine
from internlm_mm.version import __version__

__all__ = ['__version__']

check_mmengine()
