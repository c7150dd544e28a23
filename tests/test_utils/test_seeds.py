import torch
from torch import nn

from internlm_mm.utils.seeds import initializer, name_seed


def test_seeds_of_names() -> None:
    names = [f'layers.{i}.mlp.{p}_proj.weight' for i in range(100) for p in ('up', 'gate')]
    seeds = {name_seed(seed, name) for seed in range(20) for name in names}
    assert len(seeds) == 20 * len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)  # what a generator takes
    assert name_seed(1, '1/x') != name_seed(11, '/x')


def test_a_seed_never_changes() -> None:
    """Else the same config would start from other weights than it did before."""
    assert name_seed(1024, 'embed_tokens.weight') == 0xCAAEFC75978B6F


def test_the_innermost_module_with_a_rule_fills_a_parameter() -> None:
    class Ruled(nn.Module):
        def init_parameter(self, name: str) -> None: ...

    model, layer, part = Ruled(), nn.Linear(2, 2), Ruled()
    part.weight = nn.Parameter(torch.zeros(1))
    layer.part = part
    model.layers = nn.ModuleDict({'0': layer})
    assert initializer(model, 'layers.0.weight') == (model, 'layers.0.weight')
    assert initializer(model, 'layers.0.part.weight') == (part, 'weight')
