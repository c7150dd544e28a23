"""Each form trains as it is: `format=` of a dataset, or told by the file."""

import json
from pathlib import Path

import pytest

from internlm_mm.datasets import ConversationDataset
from internlm_mm.tokenizers import SentencePieceTokenizer
from tests.conversations import internlm_model
from tests.test_datasets.test_forms import (
    test_agent_flan,
    test_hermes,
    test_lagent,
    test_moss,
    test_ms_agent,
    test_sharegpt,
    test_toolbench,
    test_xlam,
)

LEARNED = {
    'toolbench': (test_toolbench, 'I ask for it.', 'Specifically'),
    'ms_agent': (test_ms_agent, '"schema": "{\\"人物\\": null}"', 'startofthink'),
    'agent_flan': (test_agent_flan, '"query": "Paris"', 'Action Input'),
    'xlam': (test_xlam, '"place": "Paris", "days": 2', 'List[float]'),
    'hermes': (test_hermes, '"id": "back"', 'tool_call>'),
    'sharegpt': (test_sharegpt, '"max": 100', 'function_call'),
    'moss': (test_moss, '"query": "自然语言"', '<|Commands|>'),
    'lagent': (test_lagent, 'print(1)', 'formatted'),
}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return internlm_model(tmp_path_factory.mktemp('internlm'))


@pytest.mark.parametrize('format', LEARNED)
def test_a_row(format: str, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    module, learned, absent = LEARNED[format]
    file = tmp_path / 'data.json'
    file.write_text(json.dumps([module.SAMPLE]))
    texts = []
    for given in (format, 'auto'):
        dataset = ConversationDataset(
            file,
            seq_len=4096,
            chat_template='internlm2',
            tokenizer=tokenizer,
            format=given,
            cache_dir=tmp_path / given,
        )
        [counts] = dataset.counts.values()
        assert counts.formats == {format: 1}
        row = dataset[0]
        texts.append(tokenizer.decode(row.labels[row.labels >= 0].tolist()))
        whole = tokenizer.decode(row.input_ids.tolist())
        assert absent not in whole
    assert texts[0] == texts[1] and learned in texts[0]
