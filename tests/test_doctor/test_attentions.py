import pytest
import torch

from internlm_mm.doctor import attentions
from internlm_mm.doctor.attentions import examine_attentions
from internlm_mm.ops.attention import reference_attention
from internlm_mm.ops.attention_trial import document_lengths
from internlm_mm.registry import ATTENTIONS

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def found() -> dict:
    return examine_attentions(CPU, torch.float32, 0.0)


def test_what_runs_on_a_cpu(found: dict) -> None:
    assert set(found) == {'auto', *ATTENTIONS.module_dict}
    for rows in ('dense', 'packed'):
        assert found['auto'][rows]['choice'] == 'sdpa' and found['auto'][rows]['why']
        assert found['sdpa'][rows] == found['reference'][rows] == {'works': True}
        for name in ('cudnn', 'varlen'):
            assert not found[name][rows]['works']
            assert f"attention='{name}' needs CUDA" in found[name][rows]['why']


@pytest.fixture
def backend():
    """Registers a backend for one test."""

    def register(name, attend):
        ATTENTIONS.register_module(name=name, module=attend)
        names.append(name)

    names: list[str] = []
    yield register
    for name in names:
        ATTENTIONS.module_dict.pop(name)


def test_a_backend_that_is_wrong_or_fails_is_told(backend) -> None:
    def leaky(q, k, v, documents):
        return reference_attention(q, k, v, None)  # whatever the documents

    def broken(q, k, v, documents):
        raise RuntimeError('no kernel image is available\nfor execution on the device')

    def detached(q, k, v, documents):
        return reference_attention(q, k.detach() + 0 * k, v, documents)

    backend('detached', detached)
    backend('leaky', leaky)
    backend('broken', broken)
    found = examine_attentions(CPU, torch.float32, 0.0)
    assert found['leaky']['dense'] == {'works': True}
    assert not found['leaky']['packed']['works']
    assert 'off the reference' in found['leaky']['packed']['why']
    for rows in ('dense', 'packed'):
        assert found['detached'][rows]['why'].startswith('its gradient of k is 1.0e+00 off')
    assert found['broken']['dense'] == {'works': False, 'why': 'no kernel image is available'}


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second for each: the rates are the arithmetic of the sizes."""
    monkeypatch.setattr(attentions, '_SIZES', {'cpu': (2, 64, 4, 8)})
    ran = []
    monkeypatch.setattr(
        attentions, 'repeat_for', lambda step, seconds, device: ran.append(step()) or 1.0
    )
    every = examine_attentions(CPU, torch.float32, 0.5)
    found = every['sdpa']
    dense = 2 * 2 * 4 * 8 * 64**2
    packed = 2 * 2 * 4 * 8 * sum(length**2 for length in document_lengths(64))
    assert found['dense']['forward_tflops'] * 1e12 == pytest.approx(dense)
    assert found['dense']['both_tflops'] * 1e12 == pytest.approx(3.5 * dense)
    assert found['packed']['forward_tflops'] * 1e12 == pytest.approx(packed)
    results = [result for kinds in every.values() for result in kinds.values()]
    working = sum(result.get('works', False) for result in results)
    assert len(ran) == 2 * working >= 8  # forward alone and with backward
