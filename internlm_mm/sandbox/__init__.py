"""A place where programs that a model wrote can do no harm; usable alone."""

from internlm_mm.sandbox.backends import SandboxError
from internlm_mm.sandbox.environment import Python, find_python, make_environment
from internlm_mm.sandbox.limits import Limits
from internlm_mm.sandbox.png import check_png
from internlm_mm.sandbox.reply import Reply
from internlm_mm.sandbox.sandbox import Sandbox
from internlm_mm.sandbox.session import Session

__all__ = [
    'Limits',
    'Python',
    'Reply',
    'Sandbox',
    'SandboxError',
    'Session',
    'check_png',
    'find_python',
    'make_environment',
]
