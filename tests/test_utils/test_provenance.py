"""Which file and line set a value."""

from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_mm.utils.config import ConfigError, load_config, to_plain
from internlm_mm.utils.provenance import Setting, explain

Write = Callable[[str, str], Path]


@pytest.fixture
def leaf(write: Write) -> Path:
    write(
        'base.py',
        """\
        _width = 4
        model = dict(
            hidden_size=_width,
            num_layers=2,
            rope=dict(theta=1e4),
        )
        hooks = [dict(interval=1)]
        """,
    )
    write(
        'middle.py',
        """\
        with read_base():
            from .base import *
        model.update(num_layers=3)
        model.update(dict(hidden_size=8, rope={'theta': 1e5}))
        """,
    )
    return write(
        'leaf.py',
        """\
        with read_base():
            from .middle import *
            from .middle import model as teacher
        _depth = 60
        model['num_layers'] = _depth
        model.num_layers = 60
        hooks.append(dict(interval=5))
        hooks[0]['interval'] = 7
        student = dict(
            model=model,
        )
        for _n in range(3):
            teacher.num_layers = _n
        for _n in range(3):
            pass
        hooks[1].pop('interval')
        hooks[1].update(interval=9)
        sizes = dict(
            short=[1, 2],
            long=(3,
                  4),
        )
        """,
    )


def chain(settings: list[Setting]) -> list[tuple[str, int, object]]:
    return [(s.file.name if s.file else 'options', s.line, s.value) for s in settings]


@pytest.mark.parametrize(
    ('key', 'expected'),
    [
        (
            'model.num_layers',
            [
                ('base.py', 4, 2),
                ('middle.py', 3, 3),
                ('leaf.py', 5, 60),
                ('leaf.py', 6, 60),
            ],
        ),
        ('model.hidden_size', [('base.py', 3, 4), ('middle.py', 4, 8)]),
        ('model.rope.theta', [('base.py', 5, 1e4), ('middle.py', 4, 1e5)]),
        ('hooks.0.interval', [('base.py', 7, 1), ('leaf.py', 8, 7)]),
        ('hooks.1.interval', [('leaf.py', 7, 5), ('leaf.py', 16, None), ('leaf.py', 17, 9)]),
        ('teacher.num_layers', [('base.py', 4, 2), ('middle.py', 3, 3), ('leaf.py', 13, 2)]),
        ('student.model.num_layers', [('leaf.py', 10, 60)]),
        ('sizes.short.1', [('leaf.py', 19, 2)]),
        ('sizes.long.1', [('leaf.py', 21, 4)]),
    ],
)
def test_every_place_is_found(leaf: Path, key: str, expected: list) -> None:
    assert chain(explain(leaf, key)) == expected


def test_the_last_setting_is_the_value(leaf: Path) -> None:
    values = to_plain(load_config(leaf)._cfg_dict)

    def walk(node: object, keys: tuple[str, ...]) -> None:
        if keys:
            last = explain(leaf, '.'.join(keys))[-1]
            assert last.value == node and not last.removed
        if isinstance(node, dict):
            for key, item in node.items():
                walk(item, (*keys, key))
        elif isinstance(node, (list, tuple)):
            for index, item in enumerate(node):
                walk(item, (*keys, str(index)))

    walk(values, ())


def test_helpers_are_followed(leaf: Path) -> None:
    width = explain(leaf, 'model.hidden_size')[0]
    assert chain(list(width.through)) == [('base.py', 1, 4)]
    student = explain(leaf, 'student.model.num_layers')[0]
    assert chain(list(student.through))[-1] == ('leaf.py', 6, 60)


def test_options_come_last(leaf: Path) -> None:
    options = {'model.num_layers': 5, 'model.hidden_size': 1, 'hooks.0.interval': 3}
    assert chain(explain(leaf, 'model.num_layers', options))[-1] == ('options', 0, 5)
    assert chain(explain(leaf, 'model', options))[-1][0] == 'options'
    assert chain(explain(leaf, 'model.rope', options))[-1][0] == 'middle.py'
    assert chain(explain(leaf, 'model.new', {'model.new': 1})) == [('options', 0, 1)]


def test_a_key_that_is_not_there(leaf: Path) -> None:
    with pytest.raises(ConfigError, match=r"'model.num_layer'. Did you mean 'num_layers'"):
        explain(leaf, 'model.num_layer')
    with pytest.raises(ConfigError, match=r"'hooks.2'. Valid: 0, 1"):
        explain(leaf, 'hooks.2')


def test_settings_print_in_one_line(leaf: Path) -> None:
    first, *_, last = explain(leaf, 'model.num_layers', {'model.num_layers': 5})
    assert str(first) == f'{leaf.parent / "base.py"}:4: num_layers=2,  -> 2'
    assert str(last) == '--cfg-options: model.num_layers=5'
