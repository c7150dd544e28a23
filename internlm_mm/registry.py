"""Every registry, one comment line each: what it holds and what a member must do.

All are children of MMEngine's, so a member registered in MMEngine is found here too, and a package
outside this one adds its own with a decorator and one import line (docs/en/plugins.md). A miss
imports `locations` once, so a config may name a class by a bare string.

MMEngine warns for every root that has no child in the default scope, which is why roots that hold
nothing of ours yet are listed too.
"""

from typing import Any

from mmengine import registry as mm
from mmengine.registry import Registry, build_model_from_cfg


def _child(root: Registry, *locations: str) -> Registry:
    folders = [f'internlm_mm.{location}' for location in locations]
    return Registry(root.name, parent=root, scope='internlm_mm', locations=folders)


def _build_model(cfg: Any, registry: Registry, default_args: Any = None) -> Any:
    """A model, and over it what its key `adapter` names."""
    if not isinstance(cfg, dict) or 'adapter' not in cfg:
        return build_model_from_cfg(cfg, registry, default_args)
    rest = cfg.copy()
    adapter = rest.pop('adapter')
    model = build_model_from_cfg(rest, registry, default_args)
    if adapter is None:
        return model
    return ADAPTERS.build(adapter, default_args={'type': 'LoRA'}).apply(model)


# engine
RUNNERS = _child(mm.RUNNERS, 'engine')  # from_cfg(cfg) -> object with train(), val()
LOOPS = _child(mm.LOOPS, 'engine')  # __init__(runner, dataloader, ...), run()
HOOKS = _child(mm.HOOKS, 'engine.hooks')  # mmengine.hooks.Hook; reads and writes `outputs`
STRATEGIES = _child(mm.STRATEGIES, 'parallel')  # BaseStrategy + forward_backward(batches, divisor)
SCHEDULES = Registry(  # a pipeline schedule of torch.distributed.pipelining, or one like it
    'pipeline schedule', scope='internlm_mm', locations=['internlm_mm.parallel']
)
LOG_PROCESSORS = _child(mm.LOG_PROCESSORS)
VISUALIZERS = _child(mm.VISUALIZERS, 'engine')  # mmengine.visualization.Visualizer
VISBACKENDS = _child(mm.VISBACKENDS)  # any MMEngine backend by name: TensorBoard, W&B, MLflow, ...
RUNNER_CONSTRUCTORS = _child(mm.RUNNER_CONSTRUCTORS)

# data
DATASETS = _child(mm.DATASETS, 'datasets')  # dataset[i] -> Row for any i >= 0; seq_len, domains
DATA_SAMPLERS = _child(mm.DATA_SAMPLERS, 'datasets')
DATALOADERS = Registry(  # iterates lists of Batch, one list a step; seek(iteration, rows)
    'dataloader', scope='internlm_mm', locations=['internlm_mm.datasets']
)
TOKENIZERS = Registry(  # internlm_mm.tokenizers.Tokenizer: encode, decode, special ids
    'tokenizer', scope='internlm_mm', locations=['internlm_mm.tokenizers']
)
CHAT_TEMPLATES = Registry(  # a function that returns a ChatTemplate: how conversations are spelt
    'chat template', scope='internlm_mm', locations=['internlm_mm.tokenizers']
)
TRANSFORMS = _child(mm.TRANSFORMS)
FUNCTIONS = _child(mm.FUNCTIONS)

# models
MODELS = Registry(  # nn.Module: forward(batch) -> dict of sums with 'loss'
    mm.MODELS.name,
    parent=mm.MODELS,
    scope='internlm_mm',
    locations=['internlm_mm.models'],
    build_func=_build_model,
)
ADAPTERS = Registry(  # apply(model) -> model, frozen, with parameters of their own over it
    'adapter', scope='internlm_mm', locations=['internlm_mm.models']
)
OBJECTIVES = Registry(  # forward(hidden, head_weight, batch) -> dict of sums with 'loss'
    'objective', scope='internlm_mm', locations=['internlm_mm.models']
)
ATTENTIONS = Registry(  # attend(q, k, v, documents) in [batch, seq, heads, head_dim]
    'attention', scope='internlm_mm', locations=['internlm_mm.ops']
)
NORMS = Registry(  # norm(x, weight, eps) -> x normalised over its last dimension
    'norm kernel', scope='internlm_mm', locations=['internlm_mm.ops']
)
CROSS_ENTROPIES = Registry(  # like internlm_mm.ops.linear_cross_entropy
    'cross-entropy kernel', scope='internlm_mm', locations=['internlm_mm.ops']
)
MODEL_WRAPPERS = _child(mm.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _child(mm.WEIGHT_INITIALIZERS)

# optimisation
OPTIMIZERS = _child(mm.OPTIMIZERS, 'optim')  # torch.optim.Optimizer; torch's own are found by name
OPTIM_WRAPPERS = _child(mm.OPTIM_WRAPPERS, 'optim')  # OptimWrapper: update_params() -> dict
OPTIM_WRAPPER_CONSTRUCTORS = _child(mm.OPTIM_WRAPPER_CONSTRUCTORS, 'optim')
PARAM_SCHEDULERS = _child(mm.PARAM_SCHEDULERS, 'optim')  # _ParamScheduler with by_epoch=False

# evaluation and the rest
TASKS = Registry(  # internlm_mm.evaluation.Task: prepare(subject), play(index), report(records)
    'evaluation task', scope='internlm_mm', locations=['internlm_mm.evaluation']
)
METRICS = _child(mm.METRICS)
EVALUATOR = _child(mm.EVALUATOR)
TASK_UTILS = _child(mm.TASK_UTILS)
INFERENCERS = _child(mm.INFERENCERS)
