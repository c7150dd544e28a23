"""What is wrong with conversations that teach a model to call tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internlm_mm.agents.schemas import argument_errors, check_schema
from internlm_mm.tokenizers.base import Tokenizer
from internlm_mm.tokenizers.chat_format import ChatTemplate
from internlm_mm.tokenizers.chat_messages import Conversation, Message, read_conversation
from internlm_mm.tokenizers.chat_parsing import Answer, read_answer_ids
from internlm_mm.tokenizers.chat_spelling import Encoded, Segment
from internlm_mm.utils.suggest import did_you_mean, kind


def check_conversation(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> list[str]:
    """Problems of one conversation, each with the message that has it.

    A tool without a JSON Schema that is one, or declared twice; a call of no declared tool, or with
    arguments that do not fit; a call that nothing answers before the conversation goes on; several
    calls where the template spells one; an answer that reads back otherwise than it was written,
    for its text spells a call or its tokens are not the template's; an answer whose stop token has
    no loss. Answers that are not learned may be anything: traces keep what was wrong in them.

    Args:
        messages: In OpenAI's form.
        tools: The functions that may be called; without any, calls are not compared.
        template: That the model is trained with.
        tokenizer: The model's.
    """
    try:
        read = read_conversation(messages, tools)
    except ValueError as error:
        return [str(error)]
    problems = list(_tool_problems(read))
    schemas = {}
    for tool in read.tools:
        function = tool['function']
        parameters = function.get('parameters') or {}
        if isinstance(parameters, Mapping) and not _schema_error(parameters):
            schemas[function['name']] = parameters
    for index, message in enumerate(read.messages):
        if message.calls and message.loss and read.tools:
            problems += _call_problems(index, message, read, schemas)
        several = message.loss and len(message.calls) > 1
        if several and template.tools is not None and not template.tools.parallel:
            problems.append(
                f'message {index}: {len(message.calls)} calls in a turn; {template.name!r} spells '
                'one'
            )
    if problems:
        return problems
    try:
        return list(_spelling_problems(messages, tools, read, template, tokenizer))
    except ValueError as error:
        return [str(error)]


def check_record(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Encoded],
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> list[str]:
    """Problems of one conversation, and if there are none, of what it became in tokens.

    Args:
        messages: As in `check_conversation`.
        tools: As in `check_conversation`.
        documents: As in `check_documents`; none if it could not be encoded.
        template: That the model is trained with.
        tokenizer: The model's.
    """
    found = check_conversation(messages, tools, template, tokenizer)
    return found or check_documents(documents, template, tokenizer)


def check_documents(
    documents: Sequence[Encoded], template: ChatTemplate, tokenizer: Tokenizer
) -> list[str]:
    """Problems of what a conversation became in tokens.

    A document that ends inside a call, or inside any answer that is learned; an answer without the
    stop token's loss. What `check_conversation` finds none of may have them: rows are cut.

    Args:
        documents: Of `ConversationEncoder`.
        template: As in `check_conversation`.
        tokenizer: As in `check_conversation`.
    """
    problems = []
    stops, words = template.stops(tokenizer)  # words, where the vocabulary lacks the tokens
    for number, document in enumerate(documents):
        for start, stop in _stretches(document.loss_mask):
            ids = document.ids[start:stop]
            text = tokenizer.decode(ids) if words else ''
            if not template.stop or {*stops} & {*ids} or any(word in text for word in words):
                continue
            answer = read_answer_ids(template, tokenizer, ids)
            cut = stop == len(document.ids)
            where = f'document {number}, tokens {start}:{stop}'
            if cut and (answer.calls or answer.errors):
                problems.append(f'{where}: it is cut off inside a call')
            elif cut:
                problems.append(f'{where}: it is cut off inside an answer')
            else:
                problems.append(f'{where}: an answer ends without a stop token that is learned')
    return problems


def _tool_problems(read: Conversation) -> Iterator[str]:
    seen = set()
    for index, tool in enumerate(read.tools):
        function = tool['function']
        if function['name'] in seen:
            yield f'tools[{index}]: {function["name"]!r} is declared twice'
        seen.add(function['name'])
        parameters = function.get('parameters') or {}
        if not isinstance(parameters, Mapping):
            yield f'tools[{index}].function.parameters: an object, not {kind(parameters)}'
        elif error := _schema_error(parameters):
            yield f'tools[{index}].function.{error}'


def _schema_error(parameters: Mapping[str, Any]) -> str:
    try:
        check_schema(parameters, 'parameters')
    except ValueError as error:
        return str(error)
    return ''


def _call_problems(
    index: int, message: Message, read: Conversation, schemas: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    names = [tool['function']['name'] for tool in read.tools]
    for number, call in enumerate(message.calls):
        field = f'message {index}, tool_calls[{number}]'
        if call.name not in names:
            yield f'{field}: there is no tool {call.name!r}.{did_you_mean(call.name, names)}'
        elif call.name in schemas:
            for error in argument_errors(call.arguments, schemas[call.name]):
                yield f'{field}.function.arguments of {call.name!r}: {error}'


def _spelling_problems(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    read: Conversation,
    template: ChatTemplate,
    tokenizer: Tokenizer,
) -> Iterator[str]:
    """Whether each answer is, in tokens, what it says."""
    spans = _answers(template.segments(messages, tools), template, tokenizer)
    stops = set(template.stops(tokenizer)[0])
    answers = [(i, m) for i, m in enumerate(read.messages) if m.role == 'assistant']
    for (index, message), (ids, mask) in zip(answers, spans, strict=True):
        if not message.loss:
            continue
        if stops and not any(m for i, m in zip(ids, mask, strict=True) if i in stops):
            yield f'message {index}: its stop token has no loss'
        found = read_answer_ids(template, tokenizer, ids, uses_tools=read.uses_tools)
        if _as_said(found) != _as_said(_expected(message, template)):
            what = found.errors[0].message if found.errors else 'it reads back otherwise'
            yield (
                f'message {index}: the answer cannot be told from a call, or from another answer, '
                f'as {template.name!r} spells it: {what}'
            )


def _answers(
    segments: Sequence[Segment], template: ChatTemplate, tokenizer: Tokenizer
) -> Iterator[Encoded]:
    """Tokens and losses of each answer; they are encoded apart from what is around them."""
    for start, stop in _stretches([segment.answer for segment in segments]):
        yield template.encode_segments(tokenizer, segments[start:stop])


def _stretches(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of true ones."""
    start = None
    for place, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = place
        elif not flag and start is not None:
            yield start, place
            start = None


def _expected(message: Message, template: ChatTemplate) -> Answer:
    content = message.content.strip() if template.strip else message.content
    thought = message.thought.strip() if template.strip else message.thought
    if message.calls and thought and not content:  # a lone thought before a call is its content
        content, thought = thought, ''
    return Answer(content, message.calls, thought)


def _as_said(answer: Answer) -> tuple[Any, ...]:
    calls = [(call.name, call.arguments) for call in answer.calls]
    return answer.content, calls, answer.thought, bool(answer.errors)
