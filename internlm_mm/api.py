"""The package without its command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from internlm_mm.checkpoint.pretrained import load_model, load_tokenizer_of
from internlm_mm.inference import Generator, Sampling


def from_pretrained(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Generator:
    """Load a model and its tokenizer to generate with.

    Args:
        path: A work dir, a checkpoint `iter_N`, or a Hugging Face folder with safetensors.
        device: Where the model goes; the first GPU if there is one, else the CPU, when None.
        dtype: Of its parameters; bfloat16 on a GPU and float32 on the CPU when None.

    Raises:
        FileNotFoundError: If there is no model at `path`.
        ValueError: If it is damaged or fits no model here.
    """
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == 'cpu' else torch.bfloat16
    return Generator(load_model(path, device, dtype), load_tokenizer_of(path))


def generate(
    model: Generator | str | Path,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
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
        seed: Of the draws; None for another one every time.

    Returns:
        What was added to each prompt.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    generator = model if isinstance(model, Generator) else from_pretrained(model)
    return generator.generate([prompts] if isinstance(prompts, str) else prompts, sampling)
