"""InternLM's training system as MMEngine plugins: pre-train, fine-tune, convert and serve."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from internlm_mm.utils.installation import check_mmengine
from internlm_mm.version import __version__

if TYPE_CHECKING:
    from internlm_mm.api import from_pretrained, generate, train

__all__ = ['__version__', 'from_pretrained', 'generate', 'train']

check_mmengine()


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first asked for: it needs torch and transformers."""
    if name in ('from_pretrained', 'generate', 'train'):
        return getattr(import_module('internlm_mm.api'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
