"""Questions whose answers a line of Python knows, with the calls that lead to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from agent_proof import draws
from agent_proof.draws import Side, operand_key, side_of
from agent_proof.mistakes import draw_mistake
from agent_proof.names import name
from agent_proof.plugins import (
    Plugin,
    draw_value,
    lookup_plugin,
    result_of,
    spell_value,
    typed_plugin,
)
from agent_proof.wordings import dress, tables, wordings
from internlm_mm.agents import Toolbox, interpreter
from internlm_mm.agents.tools import Reply


def _never(code: str) -> Reply:
    raise RuntimeError(f'no session runs {code!r}')


PYTHON = interpreter(_never)
"""The interpreter, as it is declared."""
_PYTHON = PYTHON.declaration()
DATE = 'from datetime import date\n'
DELTA = 'from datetime import date, timedelta\n'


@dataclass(frozen=True)
class Step:
    """A call and its result.

    Attributes:
        name: Of the function.
        arguments: Of the call.
        result: As the model is shown it.
    """

    name: str
    arguments: dict[str, Any]
    result: str


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        task: One of `TASKS`.
        wording: How it is worded, without what stands for operands or dresses it up.
        operands: What the answer follows from.
        question: What the user says.
        plugins: Functions that are declared.
        python: Whether the interpreter is.
        steps: Calls that lead to the answer; none where no tool is needed.
        answer: The right one.
        mistake: A wrong call before them, and what is said of it; None for none.
    """

    task: str
    wording: str
    operands: tuple[str, ...]
    question: str
    plugins: tuple[Plugin, ...]
    python: bool
    steps: tuple[Step, ...]
    answer: str
    mistake: Step | None = None

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """Functions in OpenAI's form."""
        return [*([_PYTHON] if self.python else []), *(p.declaration() for p in self.plugins)]

    def record(self) -> dict[str, Any]:
        """A conversation to train on; what the split is made by is kept beside it.

        A mistake is context only: what is learned is to mend it.
        """
        messages: list[dict[str, Any]] = [{'role': 'user', 'content': self.question}]
        for number, step in enumerate(filter(None, (self.mistake, *self.steps))):
            function = {'name': step.name, 'arguments': step.arguments}
            call = {'id': f'call_{number}', 'type': 'function', 'function': function}
            context = {'loss': False} if step is self.mistake else {}
            messages += [
                {'role': 'assistant', 'content': '', 'tool_calls': [call], **context},
                {'role': 'tool', 'tool_call_id': call['id'], 'content': step.result},
            ]
        messages.append({'role': 'assistant', 'content': self.answer})
        return self._marked({'messages': messages, 'tools': self.declarations})

    def direct(self) -> dict[str, Any]:
        """The same question without tools, and its right answer at once."""
        said = (('user', self.question), ('assistant', self.answer))
        return self._marked({'messages': [{'role': r, 'content': text} for r, text in said]})

    def question_record(self) -> dict[str, Any]:
        """The question and its answer, as `AgentTask` reads them."""
        names = [tool['function']['name'] for tool in self.declarations]
        return {
            'question': self.question,
            'answer': self.answer,
            'needs_tool': bool(self.steps),
            'subject': self.task,
            'tools': names,
        }

    def _marked(self, record: dict[str, Any]) -> dict[str, Any]:
        if not record.get('tools', True):
            del record['tools']
        kept = {'task': self.task, 'wording': self.wording, 'operands': list(self.operands)}
        return {**record, **kept, 'answer': self.answer}


@dataclass(frozen=True)
class Draft:
    """What a task draws; a case, if it is on the right side."""

    operands: tuple[str, ...]
    steps: tuple[Step, ...]
    answer: str
    plugins: tuple[Plugin, ...] = ()
    filling: tuple[str, ...] | None = None
    table: str = ''


Drawer = Callable[[random.Random, Side], Draft]


def _python(code: str, result: str) -> Step:
    return Step('python', {'code': code}, result)


def _computed(operands: Sequence[str], code: str, answer: str) -> Draft:
    return Draft(tuple(operands), (_python(code, answer),), answer)


def _times(rng: random.Random, _: Side) -> Draft:
    a, b = draws.number(rng), draws.number(rng)
    return _computed((a, b), f'print({a} * {b})', str(int(a) * int(b)))


def _plus(rng: random.Random, _: Side) -> Draft:
    a, b = draws.number(rng, (6, 7)), draws.number(rng, (6, 7))
    return _computed((a, b), f'print({a} + {b})', str(int(a) + int(b)))


def _minus(rng: random.Random, _: Side) -> Draft:
    a, b = draws.number(rng, (6, 7)), draws.number(rng, (6, 7))
    return _computed((a, b), f'print({a} - {b})', str(int(a) - int(b)))


def _remainder(rng: random.Random, _: Side) -> Draft:
    a, b = draws.number(rng, (7, 8)), draws.number(rng, (4, 5))
    return _computed((a, b), f'print({a} % {b})', str(int(a) % int(b)))


def _reverse(rng: random.Random, _: Side) -> Draft:
    text = draws.word(rng, (8, 9, 10))
    return _computed((text,), f"print('{text}'[::-1])", text[::-1])


def _sort(rng: random.Random, _: Side) -> Draft:
    text = draws.word(rng, (8, 9, 10))
    return _computed((text,), f"print(''.join(sorted('{text}')))", ''.join(sorted(text)))


def _days(rng: random.Random, _: Side) -> Draft:
    first, last = sorted((draws.day(rng), draws.day(rng)))
    code = f"{DATE}print((date.fromisoformat('{last}') - date.fromisoformat('{first}')).days)"
    return _computed((str(first), str(last)), code, str((last - first).days))


def _later(rng: random.Random, _: Side) -> Draft:
    first, days = draws.day(rng), int(draws.number(rng, (3, 4)))
    code = f"{DELTA}print(date.fromisoformat('{first}') + timedelta(days={days}))"
    return _computed((str(first), str(days)), code, str(first + timedelta(days=days)))


def _rows(rng: random.Random) -> tuple[list[str], str]:
    numbers = [draws.number(rng, (3, 4)) for _ in range(rng.choice((3, 4)))]
    return numbers, '\n'.join(f'{draws.word(rng, (3, 4))} {value}' for value in numbers)


def _total(rng: random.Random, _: Side) -> Draft:
    numbers, table = _rows(rng)
    answer = str(sum(map(int, numbers)))
    code = f'print(sum([{", ".join(numbers)}]))'
    return Draft(tuple(numbers), (_python(code, answer),), answer, filling=(), table=table)


def _range(rng: random.Random, _: Side) -> Draft:
    numbers, table = _rows(rng)
    values = [int(number) for number in numbers]
    answer = str(max(values) - min(values))
    code = f'x = [{", ".join(numbers)}]\nprint(max(x) - min(x))'
    return Draft(tuple(numbers), (_python(code, answer),), answer, filling=(), table=table)


def _looked_up(rng: random.Random, side: Side) -> tuple[Plugin, str, str, Step]:
    thing, item = name(rng, side), draws.word(rng)
    plugin = lookup_plugin(rng, side, thing, {thing})
    (parameter,) = plugin.types
    arguments = {parameter: item}
    step = Step(plugin.name, arguments, str(result_of(plugin.name, **arguments)))
    return plugin, thing, item, step


def _lookup(rng: random.Random, side: Side) -> Draft:
    plugin, thing, item, step = _looked_up(rng, side)
    return Draft((thing, item), (step,), step.result, (plugin,))


def _lookup_times(rng: random.Random, side: Side) -> Draft:
    plugin, thing, item, step = _looked_up(rng, side)
    factor = draws.number(rng, (3, 4))
    answer = str(int(step.result) * int(factor))
    steps = (step, _python(f'print({step.result} * {factor})', answer))
    return Draft((thing, item, factor), steps, answer, (plugin,))


def _times_minus(rng: random.Random, _: Side) -> Draft:
    a, b, c = (draws.number(rng) for _ in range(3))
    product = int(a) * int(b)
    answer = str(product - int(c))
    steps = (
        _python(f'x = {a} * {b}\nprint(x)', str(product)),
        _python(f'print(x - {c})', answer),
    )
    return Draft((a, b, c), steps, answer)


def _call(rng: random.Random, side: Side) -> Draft:
    plugin = typed_plugin(rng, side)
    arguments = {
        key: draw_value(rng, kind)
        for key, kind in plugin.types.items()
        if key not in plugin.optional
    }
    said = ' and '.join(f'{key} {spell_value(value)}' for key, value in arguments.items())
    answer = str(result_of(plugin.name, **arguments))
    step = Step(plugin.name, arguments, answer)
    operands = (plugin.name, *map(spell_value, arguments.values()))
    return Draft(operands, (step,), answer, (plugin,), (plugin.name, said))


def _said(rng: random.Random) -> str:
    return draws.word(rng, (5, 6, 7)) if rng.random() < 0.5 else draws.number(rng, (5, 6, 7))


def _repeat(rng: random.Random, _: Side) -> Draft:
    text = _said(rng)
    return Draft((text,), (), text)


def _greet(rng: random.Random, _: Side) -> Draft:
    text = draws.word(rng, (4, 5, 6, 7))
    return Draft((text,), (), f'Hello, {text}.')


def _first(rng: random.Random, _: Side) -> Draft:
    first, second = _said(rng), _said(rng)
    return Draft((first, second), (), first)


DRAWERS: dict[str, Drawer] = {
    'times': _times,
    'plus': _plus,
    'minus': _minus,
    'remainder': _remainder,
    'reverse': _reverse,
    'sort': _sort,
    'days': _days,
    'later': _later,
    'total': _total,
    'range': _range,
    'lookup': _lookup,
    'call': _call,
    'lookup_times': _lookup_times,
    'times_minus': _times_minus,
    'repeat': _repeat,
    'greet': _greet,
    'first': _first,
}
GROUPS = {
    'arithmetic': ('times', 'plus', 'minus', 'remainder'),
    'strings': ('reverse', 'sort'),
    'dates': ('days', 'later'),
    'tables': ('total', 'range'),
    'tools': ('lookup', 'call'),
    'several steps': ('lookup_times', 'times_minus'),
    'no tool': ('repeat', 'greet', 'first'),
}
TASKS = tuple(task for tasks in GROUPS.values() for task in tasks)
PLUGIN_TASKS = ('lookup', 'call', 'lookup_times')
"""Those that call a function with an invented name."""
MISTAKEN = 0.2
"""Share of them in training that begins with a wrong call."""


def draw_case(task: str, rng: random.Random, side: Side, names: Side | None = None) -> Case:
    """A case on one side of the split: by its wording, its operands and its answer.

    Args:
        task: One of `TASKS`.
        rng: To draw from.
        side: Of wording, operands and answer.
        names: Of functions, parameters and things; the same side by default.
    """
    while True:
        draft = DRAWERS[task](rng, names or side)
        if (
            side_of('operands', operand_key(draft.operands)) == side
            and side_of('answer', draft.answer) == side
        ):
            break
    wording = rng.choice(wordings(task, side))
    filling = draft.operands if draft.filling is None else draft.filling
    question = dress(wording, rng, side).format(*filling)
    if tables(wording):
        question += f'\n{draft.table}'
    plugins, python = _declared(task, draft.plugins, rng, names or side, side)
    case = Case(task, wording, draft.operands, question, plugins, python, draft.steps, draft.answer)
    if side == 'train' and task in PLUGIN_TASKS and rng.random() < MISTAKEN:
        return replace(case, mistake=_mistake(rng, case))
    return case


def _mistake(rng: random.Random, case: Case) -> Step:
    """The first call as a model gets it wrong, and what the toolbox says of that."""
    call, arguments = draw_mistake(rng, case.steps[0].name, case.steps[0].arguments, case.plugins)
    tools = [*([PYTHON] if case.python else []), *(plugin.tool() for plugin in case.plugins)]
    return Step(call, arguments, Toolbox(tools).call(call, arguments).content())


def _declared(
    task: str, needed: tuple[Plugin, ...], rng: random.Random, names: Side, side: Side
) -> tuple[tuple[Plugin, ...], bool]:
    """What a model may call: what it needs, and mostly something else.

    Training shows another function more often where one is to be chosen by what it gives: that is
    learned last.
    """
    plugins = list(needed)
    chosen = side == 'train' and task in PLUGIN_TASKS
    if rng.random() < (0.9 if chosen else 0.5):
        taken = {used for plugin in plugins for used in (plugin.name, *plugin.types)}
        taken |= {plugin.description.split()[2] for plugin in plugins}
        thing = name(rng, names, taken)
        plugins.append(lookup_plugin(rng, names, thing, taken | {thing}))
    rng.shuffle(plugins)
    optional = task in ('lookup', 'call', *GROUPS['no tool'])
    return tuple(plugins), not optional or rng.random() < 0.7


def draw_cases(
    task: str,
    count: int,
    *,
    side: Side,
    seed: int,
    names: Side | None = None,
    taken: set[str] | None = None,
) -> list[Case]:
    """Cases of one task with different questions.

    Args:
        task: One of `TASKS`.
        count: How many.
        side: As of `draw_case`.
        seed: Another seed, other cases.
        names: As of `draw_case`.
        taken: Names of functions that no other case may declare; it grows. None: any may.
    """
    rng = random.Random(f'{task} {side} {names} {seed}')
    found: dict[str, Case] = {}
    while len(found) < count:
        case = draw_case(task, rng, side, names)
        declared = {plugin.name for plugin in case.plugins}
        if case.question in found or (taken is not None and taken & declared):
            continue
        if taken is not None:
            taken |= declared
        found[case.question] = case
    return list(found.values())
