"""Every config that is shipped loads, passes the check, dumps, and builds its model."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from internlm_mm.registry import MODELS
from internlm_mm.utils.config import check_config, dump_config, load_config, to_plain
from internlm_mm.utils.config_reader import shipped_configs
from internlm_mm.utils.provenance import explain

REPOSITORY = Path(__file__).parents[1]
LEAVES = sorted(
    [*shipped_configs().glob('*.py'), *(REPOSITORY / 'projects').glob('*/configs/*.py')]
)
BASES = sorted((shipped_configs() / '_base_').rglob('*.py'))

# Parameters of the published models, by the names of their bases. The 20B is as InternLM trains it,
# with biases, which the published weights do not have.
PARAMETERS = {
    'internlm_7b': 7_321_948_160,
    'internlm_20b': 20_089_943_040,
    'internlm_tiny': 3_347_136,
    'internlm2_1_8b': 1_889_110_016,
    'internlm2_7b': 7_737_708_544,
    'internlm2_20b': 19_861_149_696,
    'internlm3_8b': 8_804_241_408,
    'llama3_8b': 8_030_261_248,
    'mistral_7b': 7_248_023_552,
    'qwen2_5_7b': 7_615_616_512,
    'qwen3_8b': 8_190_735_360,
}


@pytest.fixture(params=LEAVES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def leaf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    if 'projects' in request.param.parts:  # a project's package lies beside its configs
        monkeypatch.syspath_prepend(request.param.parents[1])
    return request.param


def with_a_model(cfg: Config) -> Config:
    """A config of tasks alone gets the model of the checkpoint that it is given."""
    if 'model' not in cfg:
        cfg.model = load_config(shipped_configs() / '_base_' / 'models' / 'internlm_tiny.py').model
    return cfg


def test_there_are_configs() -> None:
    assert LEAVES and BASES


def test_leaf_passes_the_check(leaf: Path) -> None:
    check_config(with_a_model(load_config(leaf)))


def test_leaf_reads_the_same_in_mmengine(leaf: Path) -> None:
    if 'projects' in leaf.parts:
        pytest.skip('inherits by the name of a package, which MMEngine 0.10.7 cannot')
    theirs = {k: v for k, v in Config.fromfile(str(leaf)).to_dict().items() if k[0] != '_'}
    assert to_plain(load_config(leaf)._cfg_dict) == theirs


def test_leaf_repeats_from_its_dump(leaf: Path, tmp_path: Path) -> None:
    cfg = load_config(leaf)
    dumped = tmp_path / 'config.py'
    dumped.write_text(dump_config(cfg)[0], encoding='utf-8')
    again = load_config(dumped)
    assert to_plain(again._cfg_dict) == to_plain(cfg._cfg_dict)
    check_config(with_a_model(again))


def test_model_of_leaf_builds(leaf: Path) -> None:
    with torch.device('meta'):
        model = MODELS.build(with_a_model(load_config(leaf)).model)
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, expected in PARAMETERS.items():
        if leaf.stem.startswith(f'{name}_pretrain'):
            assert count == expected
    assert count > 0


@pytest.mark.parametrize('base', sorted((shipped_configs() / '_base_' / 'models').glob('*.py')),
                         ids=lambda path: path.stem)  # fmt: skip
def test_parameters_of_a_base(base: Path) -> None:
    expected = PARAMETERS[base.stem]
    assert f'{expected:,} parameters' in base.read_text(encoding='utf-8').splitlines()[0]
    with torch.device('meta'):
        model = MODELS.build(load_config(base).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_every_value_of_a_leaf_is_explained() -> None:
    name = 'internlm_7b_pretrain'
    model = to_plain(load_config(name)._cfg_dict)['model']
    for key, value in model.items():
        assert explain(name, f'model.{key}')[-1].value == value


@pytest.mark.parametrize('base', BASES, ids=lambda path: path.stem)
def test_base_loads(base: Path) -> None:
    assert len(load_config(base))
