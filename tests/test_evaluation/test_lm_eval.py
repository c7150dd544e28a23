"""EleutherAI's harness on an exported folder, where it is installed: the same log-probabilities."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.engine.evaluate import evaluate
from tests.questions import sums, write_jsonl
from tests.trained import trained_run

TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
TEXTS = 'doc_to_text: "{{question}}\\nAnswer:"\ndoc_to_choice: "{{options}}"\n'
LETTERS = (
    'doc_to_text: "{{question}}\\nA. {{options[0]}}\\nB. {{options[1]}}\\nC. {{options[2]}}'
    '\\nD. {{options[3]}}\\nAnswer:"\ndoc_to_choice: ["A", "B", "C", "D"]\n'
)


@pytest.mark.slow
@pytest.mark.skipif(find_spec('lm_eval') is None, reason='lm_eval is not installed')
def test_equals_the_harness(tmp_path: Path) -> None:
    work_dir, _, _ = trained_run(tmp_path, max_seq_len=256)
    hf = tmp_path / 'hf'
    convert_to_hf(work_dir, hf, dtype='float32')
    rows = [dict(question=text, options=options, answer=right) for text, options, right in sums(12)]
    data = write_jsonl(tmp_path / 'sums.jsonl', rows)
    for name, form in (('texts', TEXTS), ('letters', LETTERS)):
        task = f'task: {name}\n{form}{TASK.format(data=data)}'
        (tmp_path / 'tasks').mkdir(exist_ok=True)
        (tmp_path / 'tasks' / f'{name}.yaml').write_text(task)
    command = [
        *(sys.executable, '-m', 'lm_eval', 'run', '--model', 'hf', '--model_args'),
        f'pretrained={hf},dtype=float32,add_bos_token=True',
        *('--tasks', 'texts,letters', '--include_path', tmp_path / 'tasks', '--device', 'cpu'),
        *('--batch_size', '4', '--output_path', tmp_path / 'harness', '--log_samples'),
    ]
    offline = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')}
    subprocess.run(
        list(map(str, command)), cwd=tmp_path, env={**os.environ, **offline}, check=True,
        capture_output=True, timeout=500,
    )  # fmt: skip
    tasks = [
        dict(type='MultipleChoice', path=str(data), format='options', name=name, scoring=name)
        for name in ('texts', 'letters')
    ]
    config = tmp_path / 'tasks.py'
    config.write_text(f"val_cfg = dict(type='PerplexityLoop', tasks={tasks!r})\n")
    result = evaluate(config, checkpoint=work_dir, output=tmp_path / 'out')
    (file,) = (tmp_path / 'harness').rglob('results_*.json')
    theirs = json.loads(file.read_text())['results']
    for name in ('texts', 'letters'):
        assert result[f'{name}/accuracy'] == pytest.approx(theirs[name]['acc,none'])
        (file,) = (tmp_path / 'harness').rglob(f'samples_{name}_*.jsonl')
        samples = {row['doc_id']: row for row in map(json.loads, file.read_text().splitlines())}
        for line in (tmp_path / 'out' / f'{name}.jsonl').read_text().splitlines():
            record = json.loads(line)
            found = [float(answer[0][0]) for answer in samples[record['index']]['resps']]
            assert record['log_probs'] == pytest.approx(found, abs=2e-4)
