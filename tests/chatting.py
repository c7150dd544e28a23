"""A tiny model that has learned three conversations by heart, in a work dir."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from internlm_mm.checkpoint.checkpointer import Checkpointer
from internlm_mm.models import InternLM
from internlm_mm.tokenizers import build_template
from tests.conversations import internlm_model

SIZES = dict(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, max_seq_len=192)
FIRST = [
    {'role': 'user', 'content': 'hello'},
    {'role': 'assistant', 'content': 'Hello! What can I do for you?'},
    {'role': 'user', 'content': 'Who are you?'},
    {'role': 'assistant', 'content': 'A **tiny** model, 很小的模型。'},
]
SECOND = [
    {'role': 'system', 'content': 'Shout.'},
    {'role': 'user', 'content': 'hello'},
    {'role': 'assistant', 'content': 'HELLO!'},
]
THIRD = [
    {'role': 'user', 'content': 'Add two numbers in Python.'},
    {'role': 'assistant', 'content': '```python\ndef f1(x): return x + 2\n```\nThat is all.'},
]


def learn_chat(
    folder: Path,
    template_name: str = 'internlm2',
    steps: int = 150,
    conversations: Sequence[list[dict]] = (FIRST, SECOND, THIRD),
    tools: list[dict] | None = None,
) -> Path:
    """Train on the conversations, with the loss where the template says, and save.

    Returns:
        The work dir; its config names the template.
    """
    tokenizer = internlm_model(folder / 'tokenizer')
    template = build_template(template_name)
    rows = [template.encode(tokenizer, messages, tools) for messages in conversations]
    longest = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (longest - len(row.ids))] for row in rows])
    targets = torch.tensor(
        [
            [index if loss else -100 for index, loss in zip(*row, strict=True)]
            + [-100] * (longest - len(row.ids))
            for row in rows
        ]
    )
    torch.manual_seed(0)
    sizes = SIZES | {'vocab_size': tokenizer.vocab_size}
    sizes['max_seq_len'] = max(sizes['max_seq_len'], longest + 32)
    model = InternLM(**sizes)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(steps):
        logits = model.logits(ids)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05, 'the model has not learned its lines'
    config = {
        'model': {'type': 'internlm_mm.models.internlm.InternLM', **sizes},
        'train_dataloader': {'dataset': {'chat_template': template_name}},
    }
    tokenizer.save(folder / 'copy')
    Checkpointer(async_save=False).save(
        folder / 'work' / 'iter_1',
        {f'model.{name}': p.detach() for name, p in model.named_parameters()},
        {'iter': 1},
        {'config.json': json.dumps(config)},
        {'tokenizer': folder / 'copy'},
    )
    return folder / 'work'
