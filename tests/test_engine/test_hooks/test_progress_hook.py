"""The line on the screen, and the numbers that curves are drawn from."""

import json
from pathlib import Path

import pytest

from internlm_mm.engine.hooks import ProgressHook
from internlm_mm.engine.hooks.progress_hook import progress_line
from tests.helpers import tiny_runner


def scalars(work_dir: Path) -> list[dict]:
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_first_interval_and_last(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, default_hooks__progress__interval=2, train_cfg__max_iters=5)
    runner.train()
    lines = scalars(tmp_path)
    assert [line['step'] for line in lines] == [1, 2, 4, 5]
    assert all({'loss', 'lr', 'grad_norm', 'num_tokens', 'time'} <= line.keys() for line in lines)
    assert lines[0]['num_tokens'] == 4 * 32
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'iter 1/5 | loss 4.' in log and 'iter 5/5' in log and 'iter 3/5' not in log


def test_evaluations_are_written_under_their_step(tmp_path: Path) -> None:
    hooks = [dict(type='EvaluationHook', interval=3)]
    tiny_runner(tmp_path, custom_hooks=hooks).train()
    lines = [line for line in scalars(tmp_path) if 'val/loss' in line]
    assert [line['step'] for line in lines] == [3, 6]
    assert all('val/perplexity' in line for line in lines)
    assert 'evaluation at 3 | all loss 4.' in next(tmp_path.glob('*/*.log')).read_text()


def test_a_line_with_everything() -> None:
    values = dict(
        loss=5.12344,
        lr=3e-4,
        grad_norm=1.2341,
        skipped=1,
        num_skipped=2,
        loss_scale=65536,
        tokens_per_second=12345.6,
        tflops=389.7,
        mfu_full=0.394,
        mfu_causal=0.37,
        eta=3723.4,
    ) | {'domain_loss/code': 1.5, 'domain_loss/books': 2.25}
    assert progress_line(20, 4000, values) == (
        'iter   20/4000 | loss 5.1234 | lr 3.00e-04 | grad norm 1.234 | '
        'step skipped: gradient not finite | skipped so far 2 | loss scale 65536 | '
        '12,346 tokens/s | 390 TFLOP/s | MFU 39.4% (causal 37.0%) | eta 1:02:03 | '
        'by domain: code 1.500, books 2.250'
    )


def test_a_step_that_was_passed_over() -> None:
    assert progress_line(3, 9, {'passed_over': 1}) == 'iter 3/9 | data passed over (skip_batches)'


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match='ProgressHook: interval=0'):
        ProgressHook(interval=0)


def test_a_step_over_pairs_of_answers() -> None:
    values = {'loss': 0.5, 'lr': 1e-5, 'grad_norm': 1.0}
    pairs = {'rewards/accuracy': 0.75, 'rewards/margin': 1.25}
    line = progress_line(3, 9, values | pairs)
    assert line.endswith('grad norm 1.000 | accuracy 0.750 margin 1.250')


def test_an_evaluation_without_perplexity_tells_its_loss(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path)
    hook = ProgressHook()
    hook.before_run(runner)
    hook.after_val_epoch(runner, {'loss': 0.5, 'rewards/accuracy': 0.75, 'loss/code': 0.25})
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'evaluation at 0 | loss 0.5000 | rewards/accuracy 0.7500 | loss/code 0.2500' in log
