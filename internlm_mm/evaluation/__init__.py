"""What is measured on held-out data: tasks with right answers."""

from internlm_mm.evaluation.agent_task import AgentTask
from internlm_mm.evaluation.code_task import CodeTask
from internlm_mm.evaluation.generated_answer import GeneratedAnswer
from internlm_mm.evaluation.generating import TextWriter
from internlm_mm.evaluation.multiple_choice import MultipleChoice
from internlm_mm.evaluation.outside import OutsideWorker
from internlm_mm.evaluation.program_task import ProgramTask
from internlm_mm.evaluation.requests import Generate, LogProb, LogProbAnswer, Outside
from internlm_mm.evaluation.scoring import LogProbScorer
from internlm_mm.evaluation.session import Answerers, run_task, write_records, write_reports
from internlm_mm.evaluation.task import Play, Report, Subject, Task
from internlm_mm.evaluation.tool_call_task import ToolCallTask

__all__ = [
    'AgentTask',
    'Answerers',
    'CodeTask',
    'Generate',
    'GeneratedAnswer',
    'LogProb',
    'LogProbAnswer',
    'LogProbScorer',
    'MultipleChoice',
    'Outside',
    'OutsideWorker',
    'Play',
    'ProgramTask',
    'Report',
    'Subject',
    'Task',
    'TextWriter',
    'ToolCallTask',
    'run_task',
    'write_records',
    'write_reports',
]
