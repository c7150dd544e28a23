"""Models that call tools: what a tool is, the loop that runs one, and checks of its data."""

from internlm_mm.agents.checks import check_conversation, check_documents, check_record
from internlm_mm.agents.loop import Agent, Event, Trace
from internlm_mm.agents.schemas import schema_of
from internlm_mm.agents.tools import Result, Tool, Toolbox, interpreter, tool

__all__ = [
    'Agent',
    'Event',
    'Result',
    'Tool',
    'Toolbox',
    'Trace',
    'check_conversation',
    'check_documents',
    'check_record',
    'interpreter',
    'schema_of',
    'tool',
]
