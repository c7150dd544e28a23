"""The settings of PEFT's adapters, `adapter_config.json`: what is known of them is told apart.

PEFT has many kinds of adapters in one format, whose tensors look alike and mean something else. So
what is not known to leave a plain LoRA as it is, is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_NAME = 'adapter_config.json'

_FREE = frozenset({
    *('r', 'lora_alpha', 'lora_dropout', 'use_rslora', 'use_dora'),  # read
    # Which layers have adapters is seen in the tensors.
    *('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'),
    # What it is for and where it came from. A head that it brings is in modules_to_save.
    *('task_type', 'auto_mapping', 'peft_version', 'inference_mode'),
    *('base_model_name_or_path', 'revision'),
    # Of other settings that must be off, or of how to run it.
    *('megatron_core', 'qalora_group_size', 'ensure_weight_tying', 'runtime_config'),
})  # fmt: skip
"""Settings that may have any value."""

_OFF: tuple[Any, ...] = (None, False, {}, [])
"""What any other setting must be, those of later versions included."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    'peft_type': ('LORA',),
    'bias': ('none', None),
    # They say how training began, and leave the frozen weights as they are.
    'init_lora_weights': (True, False, None, 'gaussian', 'orthogonal'),
}
"""Settings that have values of their own."""

_CHANGE_BASE = ('pissa', 'olora', 'corda', 'loftq', 'lora_ga')


def read_peft_config(folder: str | Path) -> dict[str, Any]:
    """Content of adapter_config.json.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is damaged, or asks for what is not known here.
    """
    file = Path(folder) / CONFIG_NAME
    if not file.is_file():
        raise FileNotFoundError(f'{folder} holds no adapters of PEFT: {CONFIG_NAME} is missing')
    try:
        said = json.loads(file.read_text(encoding='utf-8'))
        rank, alpha = said['r'], said['lora_alpha']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{file} is truncated or damaged: {error!r}') from error
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise ValueError(f'{file}: r={rank!r} and lora_alpha={alpha!r} must be numbers')
    for key, value in said.items():
        if key not in _FREE and value not in _MUST_BE.get(key, _OFF):
            raise ValueError(f'{file}: {_refusal(key, value)}')
    return said


def _refusal(key: str, value: Any) -> str:
    valid = _MUST_BE.get(key, _OFF)
    known = ' or '.join(json.dumps(one) for one in valid)
    message = f'{key}={value!r} is not known here, only {known}'
    if key == 'init_lora_weights' and str(value).lower().startswith(_CHANGE_BASE):
        message += (
            ': this one changes the frozen weights before training, and the adapters fit the '
            'changed ones alone'
        )
    return (
        f'{message}. Load the folder with peft, and save what merge_and_unload() gives: a Hugging '
        'Face folder of all weights, which is read here'
    )
