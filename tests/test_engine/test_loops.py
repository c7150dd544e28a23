import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mmengine.hooks import Hook
from torch import Tensor

from internlm_mm.datasets import EvalLoader, RandomTokens, TokenLoader
from internlm_mm.datasets.packing import Row, collate_rows
from internlm_mm.ops.attention import make_documents
from internlm_mm.structures import IGNORE_INDEX
from internlm_mm.utils.shards import local_tensor
from tests.helpers import tiny_runner

FLOAT64 = {'param': 'float64', 'reduce': 'float64'}
NO_VALIDATION = dict(val_dataloader=None, val_cfg=None)


class Recorder(Hook):
    """Keeps what every step put out, and a copy of the weights after it."""

    def __init__(self) -> None:
        self.outputs: list[dict] = []
        self.weights: list[dict[str, Tensor]] = []
        self.rows: list[list[list[int]]] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.outputs.append(dict(outputs))
        weights = {name: p.detach() for name, p in runner.model.named_parameters()}
        # FSDP2's are the whole ones too, in the one process of these tests.
        whole = {n: local_tensor(w) for n, w in weights.items()}
        self.weights.append({name: weight.clone() for name, weight in whole.items()})
        self.rows.append([ids for batch in data_batch for ids in batch.input_ids.tolist()])

    def numbers(self, key: str) -> list[float]:
        return [float(outputs[key]) for outputs in self.outputs]


def trained(folder: Path, **changes) -> Recorder:
    recorder = Recorder()
    tiny_runner(folder, hooks=[recorder], **{**NO_VALIDATION, **changes}).train()
    return recorder


def assert_same_weights(first: Recorder, second: Recorder, tolerance: float) -> None:
    torch.testing.assert_close(
        first.weights[-1], second.weights[-1], rtol=tolerance, atol=tolerance
    )


# ------------------------------------------------------------------------------- training


def test_a_step_may_be_cut_into_micro_batches(tmp_path: Path) -> None:
    runs = [
        trained(
            tmp_path / str(size),
            train_cfg__micro_batch_size=size,
            train_cfg__max_iters=4,
            strategy__precision=FLOAT64,
        )
        for size in (4, 2, 1)
    ]
    for run in runs[1:]:
        assert run.rows == runs[0].rows
        assert run.numbers('loss') == pytest.approx(runs[0].numbers('loss'), rel=1e-12)
        assert run.numbers('grad_norm') == pytest.approx(runs[0].numbers('grad_norm'), rel=1e-11)
        assert_same_weights(run, runs[0], 1e-9)


def test_what_a_step_puts_out(tmp_path: Path) -> None:
    run = trained(tmp_path)
    dataset = RandomTokens(vocab_size=64, seq_len=32, document_lengths=[5, 9, 14], seed=1024)
    for step, outputs in enumerate(run.outputs):
        rows = [dataset[4 * step + row] for row in range(4)]
        assert run.rows[step] == [row.input_ids.tolist() for row in rows]
        assert outputs['num_tokens'] == 4 * 32
        assert outputs['num_targets'] == sum((row.labels != IGNORE_INDEX).sum() for row in rows)
        assert outputs['consumed_tokens'] == (step + 1) * 4 * 32
        assert outputs['time'] >= outputs['data_time'] > 0
        assert (outputs['skipped'], outputs['num_skipped']) == (0, 0)
    # An untrained model of tiny weights guesses among 64 tokens.
    assert run.numbers('loss')[0] == pytest.approx(math.log(64), rel=1e-2)
    # Warm-up over 2 steps to 0.01, then a cosine over the other 4 down to a tenth.
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert run.numbers('lr') == pytest.approx([0.005, 0.01, *(0.01 * f for f in cosine)], rel=1e-12)


def test_skipped_batches_pass_data_over(tmp_path: Path) -> None:
    run = trained(tmp_path, train_cfg__skip_batches=[(1, 2), (4, 4)])
    plain = trained(tmp_path / 'plain')
    assert run.rows == plain.rows  # the data goes on,
    passed = [outputs.get('passed_over', 0) for outputs in run.outputs]
    assert passed == [0, 1, 1, 0, 1, 0]
    for step in (1, 2, 4):
        for name, value in run.weights[step].items():
            assert torch.equal(value, run.weights[step - 1][name])  # and the weights do not
        assert 'loss' not in run.outputs[step]
    assert run.outputs[3]['lr'] == plain.outputs[3]['lr']  # schedules go on as well
    assert run.outputs[-1]['consumed_tokens'] == plain.outputs[-1]['consumed_tokens']


def test_the_batch_grows(tmp_path: Path) -> None:
    run = trained(
        tmp_path,
        train_cfg__global_batch_size=8,
        train_cfg__rampup=dict(start=2, increment=4, interval=2),
    )
    assert [len(rows) for rows in run.rows] == [2, 2, 6, 6, 8, 8]
    dataset = RandomTokens(vocab_size=64, seq_len=32, document_lengths=[5, 9, 14], seed=1024)
    read = [row for rows in run.rows for row in rows]
    assert read == [dataset[index].input_ids.tolist() for index in range(32)]  # none twice, no gap
    assert [outputs['num_tokens'] for outputs in run.outputs] == [
        32 * n for n in (2, 2, 6, 6, 8, 8)
    ]


def test_fp16_finds_its_scale(tmp_path: Path) -> None:
    """The first scale overflows: those steps are skipped and counted, and time goes on."""
    try:
        run = trained(
            tmp_path,
            train_cfg__max_iters=10,
            strategy__precision={'param': 'float16', 'reduce': 'float32'},
            optim_wrapper__loss_scale=dict(initial=2.0**24, hysteresis=1),
        )
    finally:
        dist.destroy_process_group()
    skipped = run.numbers('skipped')
    overflows = int(sum(skipped))
    assert 1 < overflows < 9 and skipped == [1] * overflows + [0] * (10 - overflows)
    assert run.numbers('num_skipped') == [min(n + 1, overflows) for n in range(10)]
    assert run.numbers('loss_scale') == [2.0 ** (24 - min(n, overflows)) for n in range(10)]
    for name, value in run.weights[0].items():
        assert torch.equal(run.weights[overflows - 1][name], value), name
        assert not torch.equal(run.weights[-1][name], value), name
    assert run.numbers('lr')[:3] == pytest.approx([0.005, 0.01, 0.01], rel=1e-12)
    assert run.outputs[-1]['consumed_tokens'] == 10 * 4 * 32


class Masked(RandomTokens):
    """Step 1 has no label; a domain for each half of the rest."""

    domains = ('even', 'odd')

    def __getitem__(self, index: int) -> Row:
        row = super().__getitem__(index)
        labels = row.labels.copy()
        if index // 4 == 1:
            labels[:] = IGNORE_INDEX
        return Row(
            input_ids=row.input_ids, labels=labels, lengths=row.lengths, max_docs=row.max_docs,
            domain_ids=(row.input_ids * 0 + index % 2), num_domains=2,
        )  # fmt: skip


def masked() -> Masked:
    return Masked(vocab_size=64, seq_len=32)


def test_a_step_without_a_trained_token_is_an_error(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, **NO_VALIDATION)
    runner._train_dataloader = TokenLoader(masked(), global_batch_size=4, micro_batch_size=2)
    with pytest.raises(ValueError, match='step 1 has no trained token'):
        runner.train()


def test_loss_by_domain(tmp_path: Path) -> None:
    recorder = Recorder()
    runner = tiny_runner(tmp_path, hooks=[recorder], train_cfg__max_iters=1, **NO_VALIDATION)
    runner._train_dataloader = TokenLoader(masked(), global_batch_size=4, micro_batch_size=2)
    runner.prepare_training()
    weights = {n: p.detach().clone() for n, p in runner.model.named_parameters()}
    runner.call_hook('before_run')
    runner.train_loop.run()
    (outputs,) = recorder.outputs
    runner.model.load_state_dict(weights)
    for domain, name in enumerate(Masked.domains):
        rows = collate_rows([masked()[index] for index in range(4) if index % 2 == domain])
        expected = token_losses(runner.model, rows).mean().item()
        assert outputs[f'domain_loss/{name}'] == pytest.approx(expected, rel=1e-5)
    means = [outputs[f'domain_loss/{name}'] for name in Masked.domains]
    assert float(outputs['loss']) == pytest.approx(sum(means) / 2, rel=1e-6)  # as many of each


def test_a_hook_may_stop_training(tmp_path: Path) -> None:
    class Stop(Recorder):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
            runner.train_loop.stop_training = batch_idx == 2

    stop = Stop()
    runner = tiny_runner(tmp_path, hooks=[stop], **NO_VALIDATION)
    runner.train()
    assert len(stop.outputs) == 3
    assert runner.train_loop.state_dict() == {'iter': 3, 'rows': 12, 'consumed_tokens': 3 * 128}
    assert not runner.train_loop.stopped_by_signal


def test_the_state_counts_the_step_whose_hooks_are_running(tmp_path: Path) -> None:
    class Position(Hook):
        states: list[dict] = []  # noqa: RUF012

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            self.states.append(runner.train_loop.state_dict())

    hook = Position()
    tiny_runner(tmp_path, hooks=[hook], train_cfg__max_iters=2, **NO_VALIDATION).train()
    assert hook.states == [
        {'iter': 1, 'rows': 4, 'consumed_tokens': 128},
        {'iter': 2, 'rows': 8, 'consumed_tokens': 256},
    ]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train_cfg__max_iters': 0}, r'train_cfg\.max_iters=0'),
        ({'train_cfg__skip_batches': [(3, 1)]}, r'skip_batches: \(3, 1\) is not an interval'),
        ({'train_cfg__skip_batches': [(-1, 1)]}, r'skip_batches: \(-1, 1\)'),
        ({'train_cfg__global_batch_size': 5}, '5'),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_runner(tmp_path, **changes, **NO_VALIDATION).train()


# ----------------------------------------------------------------------------- evaluation


def token_losses(model, batch) -> Tensor:
    """Loss of each trained token, from float64 log-probabilities of all logits at once."""
    with torch.no_grad():
        hidden = model.hidden_states(
            batch.input_ids, batch.position_ids, make_documents(batch, need_mask=True)
        )
        logits = model.lm_head(hidden).double()
    labels = batch.labels
    kept = labels != IGNORE_INDEX
    picked = F.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -picked[kept]


def test_perplexity_is_a_plain_computation_over_the_same_rows(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path, load_from=None, strategy__precision=FLOAT64)
    metrics = runner.val()
    dataset = RandomTokens(vocab_size=64, seq_len=32, num_rows=6, seed=7)
    losses = token_losses(runner.model, collate_rows([dataset[index] for index in range(6)]))
    assert len(losses) == 6 * 32
    expected = losses.mean().item()
    assert metrics['loss'] == pytest.approx(expected, rel=1e-12)
    assert metrics['perplexity'] == pytest.approx(math.exp(expected), rel=1e-12)


@pytest.mark.parametrize('micro_batch_size', [1, 4, 5])
def test_perplexity_by_domain_whatever_the_batches(tmp_path: Path, micro_batch_size: int) -> None:
    data = Masked(vocab_size=64, seq_len=32, num_rows=11, document_lengths=[3, 17])
    runner = tiny_runner(tmp_path, strategy__precision=FLOAT64)
    runner._val_dataloader = EvalLoader(data, micro_batch_size=micro_batch_size)
    metrics = runner.val()
    rows = [data[index] for index in range(11)]
    for domain, name in enumerate(Masked.domains):
        losses = token_losses(runner.model, collate_rows(rows[domain::2]))
        assert metrics[f'loss/{name}'] == pytest.approx(losses.mean().item(), rel=1e-12)
        assert metrics[f'perplexity/{name}'] == pytest.approx(losses.mean().exp().item(), rel=1e-12)
    losses = token_losses(runner.model, collate_rows(rows))  # not the mean of the domains' means
    assert metrics['loss'] == pytest.approx(losses.mean().item(), rel=1e-12)
    kinds = ('loss', 'perplexity', 'token_accuracy')
    assert set(metrics) == {f'{kind}{end}' for kind in kinds for end in ('', '/even', '/odd')}


def test_token_accuracy_by_domain(tmp_path: Path) -> None:
    data = Masked(vocab_size=64, seq_len=32, num_rows=11, document_lengths=[3, 17])
    runner = tiny_runner(tmp_path, strategy__precision=FLOAT64)
    runner._val_dataloader = EvalLoader(data, micro_batch_size=4)
    metrics = runner.val()
    right, counted = {}, {}
    for domain, name in enumerate(Masked.domains):
        batch = collate_rows([data[index] for index in range(domain, 11, 2)])
        hidden = runner.model.hidden_states(
            batch.input_ids, batch.position_ids, make_documents(batch, need_mask=True)
        )
        found = runner.model.lm_head(hidden).argmax(-1)
        right[name] = (found == batch.labels).sum().item()
        counted[name] = (batch.labels != IGNORE_INDEX).sum().item()
        expected = right[name] / counted[name]
        assert metrics[f'token_accuracy/{name}'] == pytest.approx(expected, rel=1e-12)
    expected = sum(right.values()) / sum(counted.values())
    assert metrics['token_accuracy'] == pytest.approx(expected, rel=1e-12)


def test_evaluation_does_not_perturb_training(tmp_path: Path) -> None:
    class Evaluate(Recorder):
        modes: list[bool] = []  # noqa: RUF012

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
            runner.val_loop.run()
            self.modes.append(runner.model.training)
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    evaluating = Evaluate()
    tiny_runner(tmp_path / 'a', hooks=[evaluating]).train()
    assert evaluating.modes == [True] * 6
    plain = trained(tmp_path / 'b')
    assert evaluating.numbers('loss') == plain.numbers('loss')
    for name, value in plain.weights[-1].items():
        assert torch.equal(evaluating.weights[-1][name], value), name


def test_an_absurd_loss_has_an_infinite_perplexity(tmp_path: Path, monkeypatch) -> None:
    runner = tiny_runner(tmp_path)
    monkeypatch.setattr(runner.strategy, 'evaluate', lambda batches: {'loss': torch.tensor(1e6)})
    assert runner.val()['perplexity'] == math.inf


def test_held_out_data_without_a_target_is_an_error(tmp_path: Path) -> None:
    class Unlabelled(Masked):
        def __getitem__(self, index: int) -> Row:
            return super().__getitem__(4)

    runner = tiny_runner(tmp_path)
    runner._val_dataloader = EvalLoader(
        Unlabelled(vocab_size=64, seq_len=32, num_rows=2), micro_batch_size=1
    )
    with pytest.raises(ValueError, match='no token to predict'):
        runner.val()


def test_an_evaluator_is_refused(tmp_path: Path) -> None:
    runner = tiny_runner(tmp_path)
    with pytest.raises(ValueError, match='val_evaluator is not supported'):
        runner.build_val_loop({**runner._val_loop, 'evaluator': {'type': 'Accuracy'}})
