"""`data` and `ckpt` of an InternLM config in our terms: what is read and what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from internlm_mm.utils.config_draft import Draft, Row

_OBJECT_STORES = ('boto3:', 'volc:', 'oss2:')
_READABLE = ('internlm', 'internevo', 'normal', 'hf', 'hf_llama', 'newinternlm')


def add_data(
    draft: Draft, seq_len: int, data: str | Path | None, tokenizer: str | Path | None
) -> None:
    folder = draft.look('data.train_folder')
    is_random = data is None and folder is None
    every = draft.take('data.valid_every', int, 0)
    train, validation = _folders(data) if data is not None else (None, None)
    # The original reads nothing but .bin files, so its folder is one of them wherever it lies.
    is_bin = not is_random and (train is None or _holds_bins(train))
    evaluates = every > 0 and not is_random
    evaluates &= validation is not None if data else draft.look('data.valid_folder') is not None
    draft.bases.append('_base_.datasets.' + ('random_tokens' if is_random else 'pretrain_text'))
    if is_random:
        _random(draft, seq_len)
    elif is_bin:
        root = folder if train is None else train
        _bins(draft, 'train_dataloader.dataset', root, seq_len, 'data.train_folder')
    else:
        rows = 'train_dataloader.dataset'
        draft.put(rows, 'seq_len', seq_len, 'data.seq_len')
        draft.say('data.train_folder', f'{rows}.data_root: {train}', 'changed')
        draft.put(rows, 'data_root', str(train))
        shortest = draft.take('data.min_length', int, 0)
        draft.put(rows, 'min_document_length', max(shortest, 1), 'data.min_length')
    if not is_random:
        _tokenizer(draft, data, tokenizer)
    if draft.look('data.num_worker') is not None:
        workers = draft.take('data.num_worker', int)
        draft.put('train_dataloader', 'num_workers', workers, 'data.num_worker')
    _validation(draft, evaluates, every, seq_len, validation, is_random, is_bin)


def _random(draft: Draft, seq_len: int) -> None:
    rows = 'train_dataloader.dataset'
    draft.put(rows, 'seq_len', seq_len, 'data.seq_len')
    draft.put(rows, 'vocab_size', draft.take('model.vocab_size', int))
    text = 'random tokens, which teach nothing (the original: repeated numbers); --data DIR'
    draft.rows['data.train_folder'] = Row('data.train_folder', None, 'changed', text)
    draft.say('data.min_length', 'rows of random tokens are full')


def _bins(draft: Draft, rows: str, root: str | Path, seq_len: int, key: str) -> None:
    """`.bin` files as they are; the options of the base's dataset, which read others, go."""
    block = f'{rows} ='
    note = 'read as they are; --data DIR for others'
    draft.put(block, 'type', draft.use('internlm_mm.datasets', 'InternLMBinDataset'))
    draft.put(block, 'data_root', str(root).removeprefix('local:'), key, note=note)
    draft.put(block, 'seq_len', seq_len, 'data.seq_len')
    draft.put(block, 'vocab_size', draft.take('model.vocab_size', int))
    draft.put(block, 'min_length', max(draft.take('data.min_length', int, 0), 1), 'data.min_length')


def _holds_bins(folder: Path) -> bool:
    return next(folder.rglob('*.bin.meta'), None) is not None


def _folders(data: str | Path) -> tuple[Path, Path | None]:
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'--data {folder}: no such folder; tools/preprocess_data.py makes one (docs/en/data.md)'
        )
    train = folder / 'train'
    held_out = [folder / name for name in ('validation', 'valid')]  # ours and the original's
    validation = next((path for path in held_out if path.is_dir()), None)
    return train if train.is_dir() else folder, validation


def _tokenizer(draft: Draft, data: str | Path | None, tokenizer: str | Path | None) -> None:
    """Name the tokenizer: the one given, the one the data records, or the base's."""
    if tokenizer is not None and not Path(tokenizer).exists():
        raise FileNotFoundError(
            f'--tokenizer {tokenizer}: no such file or folder; expected a .model file or a '
            "tokenizer's folder"
        )
    recorded = Path(data or '') / 'preprocessing.json'
    if tokenizer is None and recorded.is_file():
        summary = json.loads(recorded.read_text(encoding='utf-8'))
        tokenizer = summary.get('tokenizer', {}).get('path')
    if tokenizer is None:
        draft.put('', 'tokenizer', None)
    elif Path(tokenizer, 'tokenizer.json').is_file() or Path(tokenizer).suffix == '.json':
        name = draft.use('internlm_mm.tokenizers', 'HFTokenizer')
        draft.put('', 'tokenizer', {'type': name, 'path': str(tokenizer)})
    else:
        draft.put('tokenizer', 'path', str(tokenizer))


def _validation(
    draft: Draft,
    evaluates: bool,
    every: int,
    seq_len: int,
    validation: Path | None,
    is_random: bool,
    is_bin: bool,
) -> None:
    folder = draft.look('data.valid_folder')
    if not evaluates:
        if not is_random:
            draft.put('', 'val_dataloader', None)
        why = 'no held-out data' if every else 'as here: no evaluation'
        draft.say('data.valid_every', why, 'changed' if every else 'dropped')
        draft.say('data.valid_folder', why, 'changed' if every else 'dropped')
        return
    rows = 'val_dataloader.dataset'
    if is_bin:
        root = folder if validation is None else validation
        _bins(draft, rows, root, seq_len, 'data.valid_folder')
        draft.put(f'{rows} =', 'shuffle', False)
    else:
        draft.put(rows, 'seq_len', seq_len)
        draft.put(rows, 'data_root', str(validation))
        draft.say('data.valid_folder', f'{rows}.data_root: {validation}', 'changed')
    micro = draft.take('data.micro_bsz', int)
    draft.put('val_dataloader', 'micro_batch_size', micro)
    loop = draft.use('internlm_mm.engine', 'PerplexityLoop')
    draft.put('', 'val_cfg', {'type': loop})
    hook = draft.use('internlm_mm.engine.hooks', 'EvaluationHook')
    evaluation = {'type': hook, 'interval': every}
    draft.put('default_hooks', 'evaluation', evaluation, 'data.valid_every')


def add_checkpoints(draft: Draft) -> None:
    folder = _path(draft, 'ckpt.save_ckpt_folder')
    if folder:
        draft.put('', 'work_dir', folder, 'ckpt.save_ckpt_folder')
    every = draft.look('ckpt.checkpoint_every')
    saves = draft.take('ckpt.enable_save_ckpt', bool, bool(every))
    key = 'ckpt.enable_save_ckpt'
    if saves:
        steps = draft.take('ckpt.checkpoint_every', int)
        draft.put('default_hooks.checkpoint', 'interval', steps, 'ckpt.checkpoint_every')
        draft.put('default_hooks.checkpoint', 'keep_last', None)
        draft.say(key, 'as here: all are kept (default_hooks.checkpoint.keep_last)', 'mapped')
        waits = draft.take('ckpt.async_upload', bool, False)
        draft.put('default_hooks.checkpoint', 'async_save', waits, 'ckpt.async_upload')
    else:
        draft.put('default_hooks', 'checkpoint', None, key, note='nothing is saved, as you said')
        draft.say('ckpt.checkpoint_every', 'nothing is saved: ckpt.enable_save_ckpt=False')
        draft.say('ckpt.async_upload', 'nothing is saved: ckpt.enable_save_ckpt=False')
    resumes = draft.take('ckpt.auto_resume', bool, True)
    draft.put('', 'resume', resumes, 'ckpt.auto_resume')
    _start(draft, resumes)


def _start(draft: Draft, resumes: bool) -> None:
    """`load_from`; of an InternLM checkpoint that is always the weights alone."""
    note = 'taken where there is nothing to resume; the original ignored it' if resumes else ''
    info = draft.look('ckpt.load_ckpt_info')
    source = 'ckpt.load_ckpt_info'
    for other in ('ckpt.load_model_only_folder', 'ckpt.load_ckpt_folder'):
        if draft.look(other) is not None and info is None:
            info, source, note = draft.look(other), other, 'weights only'
        elif draft.look(other) is not None:
            draft.say(other, f'{source} counts')
    key = f'{source}.path' if isinstance(info, Mapping) else source
    if draft.look(key) is None:
        draft.say(source, 'as here: training begins from nothing')
        return
    path = _path(draft, key)
    if path is None:
        return
    draft.put('', 'load_from', path, key, note=note, changed=bool(note))
    content = draft.look(f'{source}.content', ('model',))
    content = (content,) if isinstance(content, str) else tuple(content)
    only = content == ('model',)
    text = 'the weights; optimizer, data and schedules of InternLM checkpoints are not read'
    draft.say(f'{source}.content', text, 'mapped' if only else 'changed')
    kind = draft.look(f'{source}.ckpt_type', 'internlm')
    if kind in _READABLE:
        draft.say(f'{source}.ckpt_type', 'load_from sees what a folder holds', 'mapped')
    else:
        text = 'not read: convert it to Hugging Face first (docs/en/import.md)'
        draft.say(f'{source}.ckpt_type', text, 'changed')


def _path(draft: Draft, key: str) -> str | None:
    """A path on disk without its prefix; None if there is none, or it is in an object store."""
    value = draft.look(key)
    if value is None:
        draft.say(key, 'as here: none')
        return None
    text = str(value)
    if text.startswith(_OBJECT_STORES):
        draft.say(key, 'object stores are not read or written: name a folder', 'changed')
        return None
    return text.removeprefix('local:')
