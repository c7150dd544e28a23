"""Runner, loops and hooks: the program."""

from internlm_mm.engine.loops import PerplexityLoop, TokenTrainLoop
from internlm_mm.engine.preference_loop import PreferenceLoop
from internlm_mm.engine.runner import LLMRunner
from internlm_mm.engine.visualizer import ScalarVisualizer

__all__ = ['LLMRunner', 'PerplexityLoop', 'PreferenceLoop', 'ScalarVisualizer', 'TokenTrainLoop']
