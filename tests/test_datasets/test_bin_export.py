"""What is written is read as InternLM reads it: lines of JSON, signs, and where lines start."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from internlm_mm.datasets import ConversationDataset, InternLMBinDataset
from internlm_mm.datasets.bin_export import preprocess_to_bins
from tests.conversations import internlm_model

TURNS = [(f'def f{i}', f'return x + {i}') for i in range(40)]
QUIET = dict(num_workers=0, show_progress=False)


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return internlm_model(tmp_path_factory.mktemp('tokenizer')).path


def read_as_internlm(path: Path) -> list[list[int]]:
    """By `.bin.meta`, as its JsonlDataset does."""
    meta = np.load(f'{path}.meta')
    assert meta.dtype == np.int64 and meta.shape[1] == 2
    data = path.read_bytes()
    samples = []
    for start, length in meta.tolist():
        samples.append(json.loads(data[start : data.index(b'\n', start)])['tokens'])
        assert len(samples[-1]) == length
    assert len(data.splitlines()) == len(samples)
    return samples


def test_alpaca_as_the_original_lays_it_out(tmp_path: Path, model: Path) -> None:
    """The layout of tools/alpaca_tokenizer.py, put together from SentencePiece alone."""
    records = [{'instruction': q, 'input': 'so', 'output': a} for q, a in TURNS]
    (tmp_path / 'alpaca.json').write_text(json.dumps(records))
    counts = preprocess_to_bins(
        [f'en={tmp_path}/alpaca.json'],
        tmp_path / 'out',
        tokenizer=model,
        chat_template='internlm',
        validation_fraction=0.25,
        **QUIET,
    )
    pieces = spm.SentencePieceProcessor(model_file=str(model))
    eoh, eoa, byte = (pieces.piece_to_id(p) for p in ('<eoh>', '<eoa>', '<0x0A>'))
    expected = []
    for question, answer in TURNS:
        asked = [1, *pieces.encode(f'<|User|>:{question}\nso'), eoh, *pieces.encode('\n<|Bot|>:')]
        expected.append([-i for i in asked] + [*pieces.encode(answer), eoa, byte, 2])
    parts = {s: read_as_internlm(tmp_path / f'out/{s}/en/dataset.bin') for s in counts}
    assert sorted(parts['train'] + parts['validation']) == sorted(expected)
    assert 0 < len(parts['validation']) < len(parts['train'])
    assert {s: count['en'].documents for s, count in counts.items()} == {
        split: len(samples) for split, samples in parts.items()
    }
    summary = json.loads((tmp_path / 'out/preprocessing.json').read_text())
    assert summary['tokenizer']['path'] == str(model) and summary['chat_template'] == 'internlm'
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


def test_rows_are_those_of_the_conversations(tmp_path: Path, model: Path) -> None:
    """Long ones are split alike, and losses are where they are without the detour."""
    turns = [
        {'role': role, 'content': text}
        for pair in TURNS[:9]
        for role, text in zip(('user', 'assistant'), pair, strict=True)
    ]
    lines = [{'messages': turns}, {'messages': [*turns[:2], *turns[4:6]]}]
    (tmp_path / 'c.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    preprocess_to_bins(
        [tmp_path / 'c.jsonl'],
        tmp_path / 'out',
        tokenizer=model,
        chat_template='internlm2',
        max_length=128,
        **QUIET,
    )
    options = dict(seq_len=128, packing='best_fit', cache_dir=tmp_path / 'cache')
    direct = ConversationDataset(
        tmp_path / 'c.jsonl', tokenizer=str(model), chat_template='internlm2', **options
    )
    through = InternLMBinDataset(tmp_path / 'out/train', vocab_size=direct.vocab_size, **options)
    assert direct.counts['c'].cut and len(through) == len(direct)
    for index in range(len(direct)):
        assert through[index].input_ids.tolist() == direct[index].input_ids.tolist()
        assert through[index].labels.tolist() == direct[index].labels.tolist()


def test_texts(tmp_path: Path, model: Path) -> None:
    (tmp_path / 'texts').mkdir()
    (tmp_path / 'texts/en.jsonl').write_text('{"text": "def f1"}\n{"text": "return x\\n"}')
    (tmp_path / 'held.jsonl').write_text('{"text": "x"}')
    options = dict(tokenizer=model, **QUIET)
    preprocess_to_bins(
        [tmp_path / 'texts'],
        tmp_path / 'out',
        validation_inputs=[f'en={tmp_path}/held.jsonl'],
        **options,
    )
    pieces = spm.SentencePieceProcessor(model_file=str(model))
    assert read_as_internlm(tmp_path / 'out/train/en/dataset.bin') == [
        [1, *pieces.encode(text), 2] for text in ('def f1', 'return x\n')
    ]
    assert read_as_internlm(tmp_path / 'out/validation/en/dataset.bin') == [
        [1, *pieces.encode('x'), 2]
    ]
    with pytest.raises(FileExistsError, match='--overwrite replaces it'):
        preprocess_to_bins([tmp_path / 'texts'], tmp_path / 'out', **options)
    preprocess_to_bins(
        [tmp_path / 'texts'], tmp_path / 'out', add_bos=False, overwrite=True, **options
    )
    assert read_as_internlm(tmp_path / 'out/train/en/dataset.bin')[0][0] != 1
    assert not (tmp_path / 'out/validation').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(max_length=5), 'it needs chat_template'),
        (dict(chat_template='internlm'), r'c\.jsonl:2: not JSON'),
        (dict(chat_template='internml'), "no chat template 'internml'"),
        (dict(chat_template='internlm', validation_fraction=1.0), r'must be in \[0, 1\)'),
        (
            dict(chat_template='internlm', validation_fraction=0.1, validation_inputs=['x']),
            'not both',
        ),
    ],
)
def test_mistakes_leave_nothing_behind(
    tmp_path: Path, model: Path, options: dict, message: str
) -> None:
    (tmp_path / 'c.jsonl').write_text('{"prompt": "q", "answer": "a"}\n{')
    with pytest.raises(ValueError, match=message):
        preprocess_to_bins(
            [tmp_path / 'c.jsonl'], tmp_path / 'out', tokenizer=model, **options, **QUIET
        )
    assert [path.name for path in tmp_path.iterdir()] == ['c.jsonl']


def test_records_that_are_none_and_documents_that_are_short(tmp_path: Path, model: Path) -> None:
    path = tmp_path / 'c.jsonl'
    options = dict(tokenizer=model, chat_template='internlm', **QUIET)
    path.write_text('{"prompt": "q", "answer": "a"}\n{"prompt": "q"}')
    with pytest.raises(ValueError, match=r'c\.jsonl:2, field missing'):
        preprocess_to_bins([path], tmp_path / 'out', **options)
    path.write_text(f'{{"prompt": "q", "answer": "a"}}\n{{"prompt": "q", "answer": "{"a" * 40}"}}')
    counts = preprocess_to_bins([path], tmp_path / 'out', min_document_length=40, **options)
    assert (counts['train']['c'].documents, counts['train']['c'].dropped) == (1, 1)
    with pytest.raises(ValueError, match='none is long enough'):
        preprocess_to_bins([path], tmp_path / 'no', min_document_length=4000, **options)
