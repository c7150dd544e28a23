"""Compares a config with the constructors it names, before any time is spent.

A dict with `type` is a call. Everything such a call can get wrong is found here without making it:
a name that nothing registers, an option that the constructor does not have or that is missing, a
number where text belongs.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry

from internlm_mm import registry as registries
from internlm_mm.utils.config_reader import ConfigError
from internlm_mm.utils.resolve import import_lazy, resolve_type
from internlm_mm.utils.signatures import accepts, choices_of, describe, options_of
from internlm_mm.utils.suggest import did_you_mean, nearest

MASK = '***'
"""What a dump writes in place of a secret."""


@dataclass(frozen=True)
class Place:
    """Where in a config something is built.

    Attributes:
        registry: Where names are looked up there; None is any registry.
        supplied: Arguments that the runner passes, so that a config need not.
        extra: Keys that are read there before the constructor sees the rest.
        default: The `type` when a config gives none; None means that it must.
    """

    registry: Registry | None = None
    supplied: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()
    default: str | None = None


def _place(
    registry: Registry, supplied: str = '', extra: str = '', default: str | None = None
) -> Place:
    return Place(registry, frozenset(supplied.split()), frozenset(extra.split()), default)


_RANK = 'data_rank data_world_size pin_memory'
_LOOP = _place(registries.LOOPS, 'runner dataloader')
_DATASET = _place(registries.DATASETS, 'seed')
_HOOK = _place(registries.HOOKS, extra='priority')
_METRIC = _place(registries.METRICS)

PLACES = {
    'model': _place(registries.MODELS, extra='adapter'),
    'adapter': _place(registries.ADAPTERS, default='LoRA'),
    'objective': _place(registries.OBJECTIVES),
    'tokenizer': _place(registries.TOKENIZERS),
    'train_dataloader': _place(
        registries.DATALOADERS, f'{_RANK} global_batch_size micro_batch_size rampup'
    ),
    'val_dataloader': _place(registries.DATALOADERS, _RANK),
    'dataset': _DATASET,
    'datasets': _DATASET,
    'sampler': _place(registries.DATA_SAMPLERS, 'dataset seed'),
    'train_cfg': _LOOP,
    'val_cfg': _LOOP,
    'optim_wrapper': _place(
        registries.OPTIM_WRAPPERS,
        'optimizer',
        'constructor paramwise_cfg',
        'HybridZeroOptimWrapper',
    ),
    'optimizer': _place(registries.OPTIMIZERS, 'params'),
    'param_scheduler': _place(registries.PARAM_SCHEDULERS, 'optimizer', 'convert_to_iter_based'),
    'strategy': _place(
        registries.STRATEGIES, 'work_dir experiment_name env_kwargs log_kwargs auto_scale_lr'
    ),
    'default_hooks': _HOOK,
    'custom_hooks': _HOOK,
    'log_processor': _place(registries.LOG_PROCESSORS, default='LogProcessor'),
    'visualizer': _place(registries.VISUALIZERS, 'name save_dir'),
    'vis_backends': _place(registries.VISBACKENDS, 'save_dir'),
    'metrics': _METRIC,
    'tasks': _place(registries.TASKS),
}
"""Where things are built, by the key of the dict or of the list it stands in."""

SETTINGS: dict[str, Any] = {
    'load_from': str | dict | None,
    'resume': bool | str | None,
    'launcher': Literal['none', 'pytorch', 'slurm', 'mpi'],
    'log_level': Literal['DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL'],
    'default_scope': str | None,
    'work_dir': str | None,
    'experiment_name': str | None,
    'env_cfg': dict | None,
    'randomness': dict | None,
    'custom_imports': Any,
    'runner_type': Any,
}
"""Top-level keys that are no calls, with what they hold."""

GROUPS = {
    'randomness': ('seed', 'deterministic'),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
    'custom_imports': ('imports', 'allow_failed_imports'),
}
"""Keys of the top-level dicts that are no calls."""

EXAMPLES = {
    'strategy.parallel': 'data_shard=8',
    'strategy.precision': 'param=bfloat16',
    'strategy.pipeline': 'schedule=1f1b',
    'strategy.kernels': 'norm=liger',
    'strategy.float8': 'recipe=tensorwise',
    'optim_wrapper.clip_grad': 'max_norm=1.0',
    'optim_wrapper.loss_scale': 'initial=65536.0',
}
"""Of options that are dicts, a key of each, for who gives another kind of value."""

CHOICES: dict[str, tuple[str | Registry, ...]] = {
    'strategy.reshard': ('never', 'step', 'layer'),
    'strategy.attention': ('auto', registries.ATTENTIONS),
    'strategy.context_attention': ('all_gather', 'ring'),
}
"""Of options that are words, what there is, likewise; of a registry all names in it."""

CALLS = (
    'model tokenizer train_dataloader val_dataloader train_cfg val_cfg optim_wrapper '
    'param_scheduler strategy default_hooks custom_hooks log_processor visualizer'
).split()

_SHAPES: dict[tuple[str | int, ...], type] = {('default_hooks',): dict, ('custom_hooks',): list}
_SHAPE_NAMES: dict[type, str] = {
    dict: 'a dict of hooks by role',
    list: 'a list of hooks, [dict(type=CLASS), ...]',
}
_CONTAINERS = ('default_hooks', 'custom_hooks', 'param_scheduler')


def check_config(cfg: Config) -> None:
    """Find everything that could not be built from `cfg`, without building it.

    Raises:
        ConfigError: Names every wrong key with its path, its value and the nearest valid name.
    """
    problems = list(_top_level(cfg))
    for key in CALLS:
        value = dict.get(cfg._cfg_dict, key)
        if value is not None:
            problems += _walk(value, (key,))
    if problems:
        raise ConfigError('\n'.join(dict.fromkeys(problems)))


def _top_level(cfg: Config) -> Iterator[str]:
    if cfg.get('model') is None:
        yield 'the config has no model: model = dict(type=..., ...), or load_from to take its own'
    known = [*CALLS, *SETTINGS]
    for key, value in dict.items(cfg._cfg_dict):
        if key not in known:
            yield (
                f'{key}={_short(value)}: a config has no key {key!r}.{did_you_mean(key, known)}'
                " Names of a config's own begin with an underscore."
            )
        elif key in SETTINGS:
            if not accepts(SETTINGS[key], value):
                yield _mismatch(key, value, SETTINGS[key])
            elif isinstance(value, dict) and key in GROUPS:
                for name, item in dict.items(value):
                    if (key, name) == ('randomness', 'seed') and not accepts(int | None, item):
                        yield _mismatch('randomness.seed', item, int | None)
                    if name not in GROUPS[key]:
                        hint = did_you_mean(name, GROUPS[key])
                        yield f'{key}.{name}={_short(item)}: {key} has no option {name!r}.{hint}'
    if runner := dict.get(cfg._cfg_dict, 'runner_type'):
        try:
            resolve_type(runner, registries.RUNNERS, 'runner_type')
        except ConfigError as error:
            yield str(error)


def _walk(value: Any, path: tuple[str | int, ...]) -> Iterator[str]:
    """Problems of `value`, which stands at `path`, and of everything inside it."""
    if isinstance(value, dict):
        if _SHAPES.get(path) is list:
            yield f'{path[0]}={_short(value)}: expected {_SHAPE_NAMES[list]}'
            return
        if 'type' in value or _must_be_call(path):
            yield from _check_call(value, path)
        for key, item in dict.items(value):
            if key != 'type':
                yield from _walk(item, (*path, key))
    elif (_is_member(path) or path == ('model', 'adapter')) and value is not None:
        yield f'{_dotted(path)}={_short(value)}: expected dict(type=CLASS, ...)'
    elif path in _SHAPES and not isinstance(value, _SHAPES[path]):
        yield f'{path[0]}={_short(value)}: expected {_SHAPE_NAMES[_SHAPES[path]]}'
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index))
    elif isinstance(value, str) and (value == MASK or f'://{MASK}@' in value):
        yield f'{_dotted(path)}={value!r} was masked in a dump: give the secret itself again'
    elif isinstance(value, (LazyObject, LazyAttr)) and not callable(
        import_lazy(value, _dotted(path))
    ):
        yield (
            f'{_dotted(path)}={value.module}.{value}: an imported value cannot be written back; '
            'write it as a plain number or string'
        )


_CALLS = ('dataset', 'optimizer', 'adapter', 'objective')
"""Keys below which a class is named, wherever they stand."""


def _must_be_call(path: tuple[str | int, ...]) -> bool:
    """Whether a dict at `path` has to name a class."""
    if path == ('default_hooks',):
        return False
    return len(path) == 1 or path[-1] in _CALLS or _is_member(path)


def _is_member(path: tuple[str | int, ...]) -> bool:
    return (len(path) == 2 and path[0] in _CONTAINERS) or path[:-1] == ('val_cfg', 'tasks')


def _place_of(path: tuple[str | int, ...]) -> Place:
    """What is built at `path`: its last key says, or the container that it is a member of."""
    if _is_member(path):
        return PLACES[str(path[-2])]
    key = path[-2] if isinstance(path[-1], int) else path[-1]
    return PLACES.get(str(key), Place())


def _check_call(call: dict[str, Any], path: tuple[str | int, ...]) -> Iterator[str]:
    """Problems of one dict with `type`: its name and its own keys."""
    place, where = _place_of(path), _dotted(path)
    named = dict.get(call, 'type', place.default)
    if named is None:
        yield f'{where} has no type: write {where}=dict(type=CLASS, ...)'
        return
    try:
        target = resolve_type(named, place.registry, f'{where}.type')
    except ConfigError as error:
        yield str(error)
        return
    options = options_of(target)
    if options is None:
        return
    name = getattr(target, '__name__', str(target))
    allowed = [*options.hints, *sorted(place.extra)]
    for key, value in dict.items(call):
        if key == 'constructor' and place.registry is registries.OPTIM_WRAPPERS:
            try:
                resolve_type(value, registries.OPTIM_WRAPPER_CONSTRUCTORS, f'{where}.{key}')
            except ConfigError as error:
                yield str(error)
        if key in ('type', '_scope_') or key in place.extra:
            continue
        if key not in options.hints:
            near = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.85)
            if not options.takes_any or near:
                hint = did_you_mean(key, [a for a in allowed if a not in place.supplied])
                yield f'{where}.{key}={_short(value)}: {name} has no option {key!r}.{hint}'
        elif not isinstance(value, dict) or 'type' not in value:
            if value is not options.defaults.get(key, ...) and not accepts(
                options.hints[key], value
            ):
                yield _mismatch(f'{where}.{key}', value, options.hints[key])
    missing = [key for key in options.required if key not in call and key not in place.supplied]
    if missing and not options.takes_any:
        yield f'{where}: {name} needs {", ".join(missing)}'


def _mismatch(where: str, value: Any, hint: Any) -> str:
    message = f'{where}={_short(value)}: expected {describe(hint)}'
    if isinstance(value, float) and value.is_integer() and accepts(hint, int(value)):
        return f'{message}; write {int(value)}'
    if where in EXAMPLES:
        return f'{message}, as {where}.{EXAMPLES[where]}'
    if where in CHOICES:
        choices: list[str] = []
        for choice in CHOICES[where]:
            choices += choice.module_dict if isinstance(choice, Registry) else [choice]
        return f'{message}.{did_you_mean(value, choices)}'
    near = nearest(value, choices_of(hint)) if isinstance(value, str) else ''
    return f'{message}.{near}' if near else message


def _dotted(path: tuple[str | int, ...]) -> str:
    return '.'.join(map(str, path))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'
