"""Means over held-out pairs, whatever the batches."""

import pytest

from internlm_mm.datasets.loader import EvalLoader
from internlm_mm.engine.preference_loop import PreferenceLoop
from internlm_mm.registry import MODELS
from tests.conversations import internlm_model
from tests.strategies import strategy
from tests.test_engine.test_references import dataset, pairs_in
from tests.test_models.helpers import SIZES, randomize


class Runner:
    def __init__(self, folder, micro_batch_size: int) -> None:
        self.rows = dataset(folder, shuffle=False)
        sizes = SIZES | dict(vocab_size=self.rows.vocab_size, max_seq_len=160)
        self.strategy = strategy()
        model = MODELS.build(dict(type='InternLM', **sizes, objective=dict(type='SimPO')))
        self.strategy.prepare(randomize(model, 0.1))
        self.model, self.moments = self.strategy.model, []
        self.loader = EvalLoader(self.rows, micro_batch_size=micro_batch_size)

    def build_eval_loader(self, loader):
        return self.loader

    def call_hook(self, name, **kwargs) -> None:
        self.moments.append(name)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loop')
    internlm_model(folder / 'tokenizer')
    (folder / 'pairs').mkdir()
    pairs_in(folder / 'pairs')
    return folder


def test_means_over_pairs(folder) -> None:
    runs = [Runner(folder, size) for size in (1, 3)]
    found = [PreferenceLoop(runner, {'type': 'EvalLoader'}).run() for runner in runs]
    assert found[0] == pytest.approx(found[1])
    totals: dict[str, float] = {}
    for batch in runs[0].loader:
        for key, value in runs[0].model.eval()(batch).items():
            totals[key] = totals.get(key, 0) + value.detach()
    losses = totals.pop('domain_loss') / totals.pop('domain_targets')
    wanted = {key: value.item() / 14 for key, value in totals.items()}
    wanted |= {f'loss/{name}': loss.item() for name, loss in zip('ab', losses, strict=True)}
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    assert {'loss', 'rewards/accuracy', 'rewards/margin', 'log_probs/chosen'} <= wanted.keys()
    assert runs[0].moments[0] == 'before_val' and runs[0].moments[-1] == 'after_val'
