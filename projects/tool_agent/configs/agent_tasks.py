"""What a model does with tools, on files of this machine; docs/en/agents.md says what is in them.

    python tools/test.py projects/tool_agent/configs/agent_tasks.py work_dirs/my_agent \
        --output results

Take out what you have no files of. `chat_template` is the one that the model was trained with.
"""

from internlm_mm.engine import PerplexityLoop
from internlm_mm.evaluation import AgentTask, CodeTask, ProgramTask, ToolCallTask

_template = 'internlm2'
val_cfg = dict(
    type=PerplexityLoop,
    task_batch_size=16,
    tasks=[
        dict(type=ToolCallTask, path='data/agent/validation', chat_template=_template),
        dict(
            type=ToolCallTask,
            name='bfcl',
            path='data/bfcl',
            format='bfcl',
            chat_template=_template,
            on_error='skip',
        ),
        dict(type=AgentTask, path='data/agent/questions.jsonl', chat_template=_template),
        dict(type=CodeTask, path='data/HumanEval.jsonl', chat_template=_template),
        dict(type=ProgramTask, path='data/gsm8k', split='test', chat_template=_template),
    ],
)
