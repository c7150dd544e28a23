"""The package without its command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from internlm_mm.checkpoint.pretrained import load_model, load_tokenizer_of
from internlm_mm.checkpoint.step_folders import find_checkpoint
from internlm_mm.inference import Generator, Sampling
from internlm_mm.utils.config import apply_options, load_config
from internlm_mm.utils.config_check import check_config
from internlm_mm.utils.device import device_of


def from_pretrained(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    add_bos: bool = True,
    base: str | Path | None = None,
) -> Generator:
    """Load a model and its tokenizer to generate with; adapters are merged into their base.

    Args:
        path: A work dir, a checkpoint `iter_N`, a Hugging Face folder with safetensors, or a folder
            of adapters in PEFT's format.
        device: Where the model goes; the first GPU if there is one, else the CPU, when None.
        dtype: Of its parameters; bfloat16 on a GPU and float32 on the CPU when None.
        add_bos: Whether a prompt begins with the tokenizer's bos, as documents in training did.
        base: Where the frozen weights under adapters are now, if not where they were.

    Raises:
        FileNotFoundError: If there is no model at `path`.
        ValueError: If it is damaged or fits no model here, or if there is no such device.
    """
    device = device_of(device)
    if dtype is None:
        dtype = torch.float32 if device.type == 'cpu' else torch.bfloat16
    return Generator(load_model(path, device, dtype, base), load_tokenizer_of(path, base), add_bos)


def generate(
    model: Generator | str | Path,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int | None = None,
) -> list[str]:
    """Continue texts.

    Args:
        model: What `from_pretrained` returned, or a path that it takes.
        prompts: One text or several.
        max_new_tokens: Most tokens to add.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw from the k likeliest tokens only; None for all.
        top_p: Draw from the fewest tokens whose probabilities add up to this.
        repetition_penalty: Makes tokens that are there already less likely above 1; 1 for none.
        stop: Strings that end a text, and are not part of it.
        seed: Of the draws; None for another one every time.

    Returns:
        What was added to each prompt.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=seed,
    )
    generator = model if isinstance(model, Generator) else from_pretrained(model)
    return generator.generate([prompts] if isinstance(prompts, str) else prompts, sampling)


def train(
    config: str | Path | Config,
    *,
    work_dir: str | Path | None = None,
    resume: bool | str = False,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Train in this process and return the last checkpoint.

    Args:
        config: A config file, the name of a shipped one, or a config that is loaded already.
        work_dir: Logs and checkpoints; `work_dirs/NAME` by default.
        resume: True to go on from the newest whole checkpoint of the work dir, or a path.
        options: Changes by dotted key, as `--cfg-options` takes them.

    Raises:
        ValueError: And friends, before time is spent, if the config does not hold together.
        KeyboardInterrupt: If Ctrl-C or SIGTERM stopped it, when its last checkpoint is written.
    """
    # These build on torch.distributed: seconds to import.
    from internlm_mm.engine.runner import LLMRunner
    from internlm_mm.engine.start import adopt_model

    if isinstance(config, Config):
        resolved = config
        apply_options(resolved, options or {})
    else:
        resolved = load_config(config, options)
    name = Path(resolved.filename).stem if resolved.filename else 'run'
    resolved.work_dir = str(work_dir or resolved.get('work_dir') or Path('work_dirs') / name)
    resolved.resume = resume or resolved.get('resume', False)
    adopt_model(resolved)
    check_config(resolved)
    runner = LLMRunner.from_cfg(resolved)
    runner.train()
    checkpoint = find_checkpoint(resolved.work_dir)
    if runner.train_loop.stopped_by_signal:  # what follows would take it for trained
        raise KeyboardInterrupt(
            f'training was stopped by a signal after step {runner.iter} of {runner.max_iters}; '
            f'with resume=True it goes on from {checkpoint}'
        )
    return checkpoint
