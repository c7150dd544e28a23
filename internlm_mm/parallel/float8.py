"""Matrix products of the layers in 8-bit floating point, through torchao.

Masters, their gradients and the optimizer's state stay as they are; only the operands of matrix
products are rounded, each with a scale that follows its largest value (https://arxiv.org/abs/2209.05433).
The embedding, the head and the norms are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from internlm_mm.ops.needs import Needs, obstacles
from internlm_mm.parallel.data import layers_of
from internlm_mm.utils.shards import plain_tensor
from internlm_mm.utils.suggest import did_you_mean

RECIPES = ('tensorwise', 'rowwise', 'rowwise_with_gw_hp')
"""One scale for a whole operand; one for each row or column; likewise, but for the gradient of
weights, whose product stays in the wide dtype."""

_NEEDS = Needs(
    module='torchao.float8',
    install="pip install 'internlm_mm[fp8]'",
    cuda=True,
    half=True,
    capability=(8, 9),
)
_EMULATED = Needs(module=_NEEDS.module, install=_NEEDS.install)
_MULTIPLE = 16  # of both sizes of a matrix, which the products' kernels ask for


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8:
    """The options of `strategy.float8`.

    Attributes:
        recipe: See `RECIPES`.
        all_gather: Whether weights are rounded before they are gathered, once for all
            micro-batches of a step: half the traffic and half the memory. By default with
            'tensorwise', the only recipe that can.
        skip: Globs over names of modules, as 'layers.0.*' or '*.down_proj', that stay as they are.
        emulate: Whether products are computed in the wide dtype from rounded operands, which runs
            anywhere, and slowly: for tests.
    """

    recipe: str = 'tensorwise'
    all_gather: bool | None = None
    skip: tuple[str, ...] = ()
    emulate: bool = False

    @property
    def rounds_inputs_again(self) -> bool:
        """Whether backward, too, rounds what a layer read, for the gradient of its weight."""
        return self.recipe != 'rowwise_with_gw_hp'

    @property
    def gathers(self) -> bool:
        """`all_gather`, its default filled in."""
        return self.recipe == 'tensorwise' if self.all_gather is None else self.all_gather


def check_float8(options: Mapping[str, Any] | None, param_dtype: torch.dtype) -> Float8 | None:
    """The options that a strategy was given, if any.

    Raises:
        ValueError: With the key, the value and the nearest choice.
    """
    if options is None:
        return None
    known = [field.name for field in fields(Float8)]
    for key, value in options.items():
        if key not in known:
            raise ValueError(
                f'strategy.float8.{key}={value!r} is unknown.{did_you_mean(key, known)}'
            )
    _check_kinds(options)
    found = Float8(**{**options, 'skip': tuple(options.get('skip', ()))})
    if found.recipe not in RECIPES:
        raise ValueError(
            f'strategy.float8.recipe={found.recipe!r}.{did_you_mean(found.recipe, RECIPES)}'
        )
    if found.gathers and found.recipe != 'tensorwise':
        raise ValueError(
            f"strategy.float8.all_gather=True works with recipe='tensorwise', not {found.recipe!r}"
        )
    if param_dtype == torch.float64:
        raise ValueError("strategy.float8 does not go with strategy.precision.param='float64'")
    return found


def _check_kinds(options: Mapping[str, Any]) -> None:
    """Refuse what would count as true, or be taken apart: a word for a bool, text for a list."""
    skip = options.get('skip', ())
    if not isinstance(skip, (list, tuple)) or not all(isinstance(glob, str) for glob in skip):
        raise ValueError(
            f"strategy.float8.skip={skip!r}: expected a list of globs, as ['*.down_proj']"
        )
    for key, expected in (('all_gather', 'True, False or None'), ('emulate', 'True or False')):
        value = options.get(key, False)
        if not isinstance(value, bool) and not (key == 'all_gather' and value is None):
            raise ValueError(f'strategy.float8.{key}={value!r}: expected {expected}')


def check_skip(model: nn.Module, options: Float8) -> None:
    """Refuse globs of `skip` that leave nothing out.

    Args:
        model: Whole: a stage of a pipeline has not all layers.
        options: See there.

    Raises:
        ValueError: With the glob and the nearest that would.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in options.skip:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        parts = [name.split('.') for name in names]
        globs = {f'*.{".".join(part[i:])}' for part in parts for i in range(1, len(part))}
        globs |= {f'{".".join(part[:i])}.*' for part in parts for i in range(1, len(part))}
        hint = did_you_mean(pattern, sorted({*names, *globs}))
        raise ValueError(f'strategy.float8.skip: {pattern!r} matches no linear layer.{hint}')


def check_partners(tensor: int, fuse: bool) -> None:
    """Raise ValueError for techniques that float8 does not go with.

    Args:
        tensor: Degree of tensor parallelism.
        fuse: Whether products of several layers are one.
    """
    if tensor > 1:
        raise ValueError(f'strategy.float8 does not go with strategy.parallel.tensor={tensor}')
    if fuse:
        raise ValueError(
            'strategy.float8 does not go with strategy.kernels.fuse=True: weights have scales of '
            'their own'
        )


def float8_obstacles(
    device: torch.device, dtype: torch.dtype, emulate: bool = False, elsewhere: bool = False
) -> list[str]:
    """Every reason why layers cannot compute in 8 bits here.

    Args:
        device: Where the model would run.
        dtype: What its layers compute in.
        emulate: See `Float8`.
        elsewhere: Whether that is on another machine, whose GPUs and packages are not known.
    """
    needs = _EMULATED if emulate else _NEEDS
    if elsewhere:
        needs = replace(needs, module=None)
    return obstacles(needs, device, dtype, elsewhere=elsewhere)


def check_runs(
    options: Float8, device: torch.device, dtype: torch.dtype, elsewhere: bool = False
) -> None:
    """Raise ValueError if layers cannot compute in 8 bits, with every reason.

    Args:
        options: See there.
        device: See `float8_obstacles`.
        dtype: See there.
        elsewhere: See there.
    """
    found = float8_obstacles(device, dtype, options.emulate, elsewhere)
    if found:
        raise ValueError(f'strategy.float8 {"; ".join(found)}')


def apply_float8(
    model: nn.Module,
    options: Float8,
    device: torch.device,
    param_dtype: torch.dtype,
    is_sharded: bool,
) -> str:
    """Replace the linear layers inside a model's layers; names of parameters stay.

    Args:
        model: Changed in place. To be called before layers are compiled and sharded.
        options: See there.
        device: Where the model will run.
        param_dtype: What layers compute in.
        is_sharded: Whether FSDP2 will gather the weights.

    Returns:
        What was done, for the log.

    Raises:
        ValueError: If torchao or the GPU is missing, or there is nothing to replace.
    """
    check_runs(options, device, param_dtype)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    gathers = options.gathers and is_sharded
    recipe = Float8LinearConfig.from_recipe_name(options.recipe)
    config = type(recipe)(
        **{
            **{field.name: getattr(recipe, field.name) for field in fields(recipe)},
            'enable_fsdp_float8_all_gather': gathers,
            'emulate': options.emulate,
        }
    )
    chosen, others = _choose(model, options.skip)
    if not chosen:
        raise ValueError(
            f'strategy.float8: no linear layer of {type(model).__name__}.layers has sizes that are '
            f'multiples of {_MULTIPLE} and is not in skip={list(options.skip)}'
        )
    wanted = {id(module) for module in chosen}
    for layer in layers_of(model):
        convert_to_float8_training(
            layer, module_filter_fn=lambda module, _name: id(module) in wanted, config=config
        )
    if gathers:
        for module in model.modules():
            if _is_gathered(module):
                module.register_state_dict_post_hook(_hand_out_plain_weight)
        model.register_load_state_dict_pre_hook(lambda module, *_: _forget_scales(module))
    text = f'{options.recipe}, {len(chosen)} linear layers'
    text += f', {others} left as they are' if others else ''
    return text + (', gathered in 8 bits' if gathers else '')


def _choose(model: nn.Module, skip: tuple[str, ...]) -> tuple[list[nn.Linear], int]:
    """Linear layers inside the repeated layers that can be replaced, and how many cannot."""
    inside = {id(module) for layer in layers_of(model) for module in layer.modules()}
    chosen, others = [], 0
    for name, module in model.named_modules():
        if id(module) not in inside or not isinstance(module, nn.Linear):
            continue
        fits = not (module.in_features % _MULTIPLE or module.out_features % _MULTIPLE)
        if fits and not any(fnmatchcase(name, pattern) for pattern in skip):
            chosen.append(module)
        else:
            others += 1
    return chosen, others


def rounded_weights(model: nn.Module, options: Float8 | None) -> frozenset[str]:
    """Names of the weights that FSDP2 gathers in 8 bits.

    Args:
        model: Whole, as it is before `apply_float8`.
        options: See there; None for no float8.

    Raises:
        ValueError: See `check_skip`.
    """
    if options is None:
        return frozenset()
    check_skip(model, options)
    if not options.gathers:
        return frozenset()
    chosen = {id(module) for module in _choose(model, options.skip)[0]}
    return frozenset(
        f'{name}.weight' for name, module in model.named_modules() if id(module) in chosen
    )


def scales_first(model: nn.Module, then: Callable[[], None] | None) -> Callable[[], None]:
    """What follows an update: the scales of all weights that are gathered in 8 bits.

    They are found with one reduction, which is collective; without it each weight would have a
    reduction of its own as it is gathered.

    Args:
        model: What `apply_float8` was given, sharded.
        then: What else follows, as gathering ahead; None for nothing.
    """
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    def after_step() -> None:
        precompute_float8_dynamic_scale_for_fsdp(model)
        if then is not None:
            then()

    return after_step


def _is_gathered(module: nn.Module) -> bool:
    return hasattr(_own_part(getattr(module, 'weight', None)), 'fsdp_pre_all_gather')


def _own_part(weight: Any) -> Any:
    return weight._local_tensor if isinstance(weight, DTensor) else weight


def _forget_scales(model: nn.Module) -> None:
    for module in model.modules():
        if _is_gathered(module):
            _own_part(module.weight)._precomputed_scale = None


def _hand_out_plain_weight(module: nn.Module, state: dict, prefix: str, _metadata: Any) -> None:
    """Checkpoints get the master itself, which shares its memory with what is gathered from it.

    Whoever has it may write into it, so its scale is forgotten.
    """
    name = f'{prefix}weight'
    if name not in state:
        return
    _own_part(module.weight)._precomputed_scale = None
    weight, local = state[name], plain_tensor(_own_part(state[name]))
    if isinstance(weight, DTensor):
        local = DTensor.from_local(
            local,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        )
    state[name] = local
