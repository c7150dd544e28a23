"""Formats whose folders bring their own modeling files: which those are, and how we run them.

The files lie in `internlm_mm/checkpoint/remote_code`. They are copied into a folder, where
transformers runs them for a user who says `trust_remote_code=True`; here the packaged ones are
imported, and code in a folder never is.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_mm.utils.suggest import did_you_mean

_PACKAGE = 'internlm_mm.checkpoint.remote_code'


@dataclass(frozen=True)
class RemoteFormat:
    """One format that transformers needs files of ours for.

    Attributes:
        model_type: As in config.json, and the name of the format.
        family: Beginning of the names of its classes.
    """

    model_type: str
    family: str

    @property
    def files(self) -> tuple[str, ...]:
        """The files that a folder needs, beside its weights."""
        return (
            f'configuration_{self.model_type}.py',
            f'modeling_{self.model_type}.py',
            'chat_internlm.py',
        )

    @property
    def auto_map(self) -> dict[str, str]:
        """What transformers' auto classes give, as config.json says it.

        AutoModel has the output layer too, as in the folders that InternLM's authors published:
        their users call `chat` on what it gives.
        """
        modeling = f'modeling_{self.model_type}.{self.family}'
        return {
            'AutoConfig': f'configuration_{self.model_type}.{self.family}Config',
            'AutoModel': f'{modeling}ForCausalLM',
            'AutoModelForCausalLM': f'{modeling}ForCausalLM',
            'AutoModelForSequenceClassification': f'{modeling}ForSequenceClassification',
        }


FORMATS = {
    'internlm': RemoteFormat('internlm', 'InternLM'),
    'internlm2': RemoteFormat('internlm2', 'InternLM2'),
}
"""Formats with files of their own, by name, which is their `model_type` too."""


def write_remote_code(folder: str | Path, name: str) -> dict[str, Any]:
    """Copy a format's files into a folder.

    Args:
        folder: Where they go; it must exist.
        name: A key of `FORMATS`.

    Returns:
        What its config.json must say besides the model's sizes: `auto_map`.

    Raises:
        ValueError: If the format has no files.
    """
    remote = _format(name)
    for file in remote.files:
        shutil.copyfile(Path(__file__).parent / 'remote_code' / file, Path(folder) / file)
    return {'auto_map': remote.auto_map}


def model_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The packaged classes for a folder, so that no code from the folder need run.

    Args:
        config: The content of config.json.

    Returns:
        Its configuration class, and its class for causal language modelling.

    Raises:
        ValueError: If its model_type is none of `FORMATS`.
    """
    remote = _format(str(config.get('model_type')))
    configuration, modeling, *_ = (
        # They import transformers, which takes seconds, and only converting needs it.
        importlib.import_module(f'{_PACKAGE}.{file.removesuffix(".py")}')
        for file in remote.files
    )
    return (
        getattr(configuration, f'{remote.family}Config'),
        getattr(modeling, f'{remote.family}ForCausalLM'),
    )


def _format(name: str) -> RemoteFormat:
    if name not in FORMATS:
        raise ValueError(f'no modeling files for {name!r}.{did_you_mean(name, FORMATS)}')
    return FORMATS[name]
