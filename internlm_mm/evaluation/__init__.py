"""What is measured on held-out data: tasks with right answers."""

from internlm_mm.evaluation.generated_answer import GeneratedAnswer
from internlm_mm.evaluation.generating import TextWriter
from internlm_mm.evaluation.multiple_choice import MultipleChoice
from internlm_mm.evaluation.requests import Generate, LogProb, LogProbAnswer
from internlm_mm.evaluation.scoring import LogProbScorer
from internlm_mm.evaluation.session import Answerers, run_task, write_records, write_reports
from internlm_mm.evaluation.task import Play, Report, Subject, Task

__all__ = [
    'Answerers',
    'Generate',
    'GeneratedAnswer',
    'LogProb',
    'LogProbAnswer',
    'LogProbScorer',
    'MultipleChoice',
    'Play',
    'Report',
    'Subject',
    'Task',
    'TextWriter',
    'run_task',
    'write_records',
    'write_reports',
]
