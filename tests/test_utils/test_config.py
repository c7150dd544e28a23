"""Finding, loading, overriding and dumping configs."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction

from internlm_mm.utils.config import (
    MASK,
    ConfigError,
    apply_options,
    dump_config,
    find_config,
    load_config,
    parse_cfg_options,
    to_plain,
)
from internlm_mm.utils.config_reader import shipped_configs

Write = Callable[[str, str], Path]


def leaf() -> str:
    """Name of one of our own configs."""
    return sorted(file.stem for file in shipped_configs().glob('*.py'))[0]


@pytest.mark.parametrize('form', ['{}', '{}.py', 'configs/{}', 'configs/{}.py'])
def test_our_configs_are_found_by_name_from_anywhere(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config(form.format(leaf())) == (shipped_configs() / f'{leaf()}.py').resolve()


def test_a_file_here_goes_before_ours(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(f'configs/{leaf()}.py', 'model = dict(mine=True)')
    monkeypatch.chdir(path.parents[1])
    assert find_config(f'configs/{leaf()}.py') == path.resolve()


def test_a_missing_config_names_the_nearest(tmp_path: Path) -> None:
    wrong = leaf().replace('internlm', 'internml')
    with pytest.raises(FileNotFoundError, match=f"{wrong}'. Did you mean '{leaf()}'"):
        load_config(wrong)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / 'configs' / f'{leaf()}.py')  # an absolute path means what it says


def test_a_missing_config_names_the_nearest_file_beside(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('my_pretrain.py', 'model = dict()')
    for wrong in (path.with_name('my_pretrian.py'), 'my_pretrian.py', 'my_pretrain'):
        monkeypatch.chdir(path.parent)
        with pytest.raises(FileNotFoundError, match=r"'\. Did you mean 'my_pretrain\.py'\?$"):
            load_config(wrong)
    with pytest.raises(FileNotFoundError, match=r"no config 'work_dirs/run/iter_7'\.$"):
        load_config('work_dirs/run/iter_7')
    with pytest.raises(FileNotFoundError, match=r"no config '.*': it is a folder"):
        load_config(path.parent)


def test_private_names_and_imports_are_no_settings(write: Write) -> None:
    path = write('a.py', 'import math\nfrom torch.nn import ReLU\n_n = 2\nmodel = dict(n=_n)\n')
    assert to_plain(load_config(path)._cfg_dict) == {'model': {'n': 2}}


def test_a_name_that_mmengine_keeps_for_itself(write: Write) -> None:
    with pytest.raises(ConfigError, match=r'a\.py: text is reserved'):
        load_config(write('a.py', 'text = 1\n'))


def test_custom_imports_are_made(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = write('house_plugin_a.py', '')
    write('house_plugin_b.py', '')
    monkeypatch.syspath_prepend(plugin.parent)
    path = write('a.py', 'custom_imports = dict(imports=["house_plugin_a"])\nmodel = dict()\n')
    load_config(path)
    assert 'house_plugin_a' in sys.modules
    load_config(path, {'custom_imports.imports': ['house_plugin_b']})
    assert 'house_plugin_b' in sys.modules
    with pytest.raises(ConfigError, match=r"custom_imports=\['house_plugin_c'\].*PYTHONPATH"):
        load_config(path, {'custom_imports.imports': ['house_plugin_c']})


@pytest.mark.parametrize(
    'text', ['1', '1e-4', 'true', 'None', 'abc', '[1,2]', '(1,2)', '1,2', '[(1,a),[b]]', "'x'"]
)
def test_options_are_parsed_as_mmengine_does(text: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    theirs = parser.parse_args(['--cfg-options', f'a.b={text}', 'c=1']).cfg_options
    assert parse_cfg_options([f'a.b={text}', 'c=1']) == theirs


def test_text_keeps_its_blanks_and_equals_signs() -> None:
    assert parse_cfg_options(['a=my first run', 'b=x=y']) == {'a': 'my first run', 'b': 'x=y'}


@pytest.mark.parametrize('item', ['a', '=1', 'a..b=1', '.a=1'])
def test_options_that_are_none(item: str) -> None:
    with pytest.raises(ConfigError, match='not of the form'):
        parse_cfg_options([item])


def test_a_dict_is_written_key_by_key() -> None:
    with pytest.raises(ConfigError, match=r'key by key: a\.b\.KEY=VALUE'):
        parse_cfg_options(['a.b=dict(start=4,increment=4)'])
    with pytest.raises(ConfigError, match=r'a\.b\.KEY=VALUE, after a\.b=None where it is none yet'):
        parse_cfg_options(["a.b={'start': 4, 'increment': 4}"])
    for text in ('dict()', 'dict(start=4)'):
        with pytest.raises(ConfigError, match=r'key by key: a\.b\.KEY=VALUE, after a\.b=None'):
            parse_cfg_options([f'a.b={text}'])
    assert parse_cfg_options(['a.b={question} A:']) == {'a.b': '{question} A:'}
    cfg = Config(dict(a='text'))
    apply_options(cfg, parse_cfg_options(['a=None', 'a.path=x', 'a.adapter=y']))
    assert cfg.a == dict(path='x', adapter='y')


def test_options_reach_everywhere() -> None:
    cfg = Config(dict(a=dict(b=1), c=[dict(d=1), 2], e=None, f=dict(g=dict(h=1))))
    apply_options(cfg, {'a.b': 2, 'c.0.d': 3, 'c.1': 4, 'e.x.y': 5, 'a.new': 6, 'f.g': None})
    assert cfg.to_dict() == dict(
        a=dict(b=2, new=6), c=[dict(d=3), 4], e=dict(x=dict(y=5)), f=dict(g=None)
    )


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('c.2.d', "c.2.d=1: c is a list of 2; '2' is none of its places"),
        ('c.x', "'x' is none of its places"),
        ('a.b.z', 'a.b=1 holds no keys; a.b=None before it makes room'),
    ],
)
def test_options_that_do_not_fit(key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_options(Config(dict(a=dict(b=1), c=[dict(d=1), 2])), {key: 1})


def test_a_dump_loads_again(write: Write, tmp_path: Path) -> None:
    path = write(
        'a.py',
        """
        from torch.nn import Linear
        import torch

        model = dict(
            type=Linear, sizes=(1,), empty=(), nested=[[], {}, dict(a=[dict(b='it\\'s')])],
            limit=float('inf'), small=1e-9, none=None, flag=True, text='line\\nbreak "quoted"',
            call=torch.optim.AdamW, long=list(range(60)), odd={'a b': 1, 'class': 2, 3: 'three'},
        )
        """,
    )
    cfg = load_config(path)
    python, json_text = dump_config(cfg)
    again = load_config(write('dumped.py', python))
    assert to_plain(again._cfg_dict) == to_plain(cfg._cfg_dict)
    assert dump_config(again)[0] == python
    model = json.loads(json_text)['model']
    assert model['type'] == 'torch.nn.Linear' and model['call'] == 'torch.optim.AdamW'
    (tmp_path / 'dumped.json').write_text(json_text)
    assert load_config(tmp_path / 'dumped.json').model.nested[2].a[0].b == "it's"


@pytest.mark.parametrize('value', [{2}, lambda: 1, object(), torch.nn.ReLU(), torch.float16])
def test_what_cannot_be_written_is_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r'model\.a\.1=.*cannot be written'):
        dump_config(Config(dict(model=dict(a=[1, value]))))


SECRETS = {
    'token': 'x',
    'hf_token': 'x',
    'api_key': 'x',
    'wandb_api_key': 'x',
    'password': 'x',
    'db_password': 'x',
    'client_secret': 'x',
    'AWS_SECRET_ACCESS_KEY': 'x',
}
PLAIN = {
    'tokenizer': 'x',
    'num_tokens': '3',
    'bos_token': '<s>',
    'eos_token': '</s>',
    'token_file': 'x',
    'sort_key': 'x',
    'max_keep': 3,
    'keyword': 'x',
    'tokens_per_second': 'x',
    'password_length': 8,
}


def test_secrets_are_masked_and_nothing_else() -> None:
    cfg = Config(dict(hooks=[dict(**SECRETS, **PLAIN, uri='https://me:pw@host/x', other='a@b:c')]))
    for text in dump_config(cfg):
        assert 'me:pw' not in text
    dumped = json.loads(dump_config(cfg)[1])['hooks'][0]
    assert dumped == {
        **dict.fromkeys(SECRETS, MASK),
        **PLAIN,
        'uri': f'https://{MASK}@host/x',
        'other': 'a@b:c',
    }
    assert cfg.hooks[0].token == 'x'  # the config in use keeps them


def test_loading_reads_no_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOUSE_TEST', '1')
    path = write('a.py', "model = dict(a='{{$HOUSE_TEST:2}}')\n")
    assert load_config(path).model.a == '{{$HOUSE_TEST:2}}'
