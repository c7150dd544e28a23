import json
from pathlib import Path

from internlm_mm.__main__ import main


def test_convert(tmp_path: Path, capsys):
    turns = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
    source = tmp_path / 'a.json'
    source.write_text(json.dumps([{'conversations': turns}] * 2 + [{'conversations': []}] * 7))
    target = tmp_path / 'b.jsonl'
    assert main(['convert_records', str(source), '--output', str(target)]) == 2
    assert 'a.json: record 3, messages: there is none' in capsys.readouterr().err
    arguments = [str(source), '--output', str(target), '--on-error', 'skip', '--to', 'hermes']
    assert main(['convert_records', *arguments]) == 0
    shown = capsys.readouterr()
    assert 'b.jsonl: 2 records as hermes (2 sharegpt)' in shown.out
    assert '... and 2 more' in shown.err
    assert len(target.read_text().splitlines()) == 2
    assert main(['convert_records', *arguments]) == 2
    assert 'b.jsonl exists; give another output, or --overwrite' in capsys.readouterr().err
    assert main(['convert_records', *arguments, '--overwrite']) == 0
