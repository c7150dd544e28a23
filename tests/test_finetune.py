"""From conversations in a file to an exported model that answers as it was trained."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from internlm_mm import from_pretrained
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.datasets import InternLMBinDataset
from internlm_mm.datasets.internlm_bin import samples_of, write_bin
from internlm_mm.engine import LLMRunner
from internlm_mm.inference import Chat, Sampling, template_for
from internlm_mm.utils.config import check_config, load_config
from tests.conversations import internlm_model

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')

WEATHER = {'type': 'function', 'function': {'name': 'weather'}}
ANSWERS = {
    'hello': 'Hello!',
    'def f1': 'return x + 1',
    'def f2': 'return x + 2',
    'Who are you?': 'A tiny model, 很小的模型。',
    'bye': 'Bye.',
}
CALLING = [
    {'role': 'user', 'content': 'The weather of x?'},
    {
        'role': 'assistant',
        'content': '',
        'tool_calls': [{'function': {'name': 'weather', 'arguments': {'city': 'x'}}, 'id': 'a'}],
    },
    {'role': 'tool', 'content': '3', 'tool_call_id': 'a'},
    {'role': 'assistant', 'content': 'It is 3.'},
]
GREEDY = Sampling(temperature=0, max_new_tokens=60)


def write_conversations(folder: Path) -> None:
    """Two files in two forms, which become two domains."""
    folder.mkdir(parents=True)
    lines = [{'instruction': q, 'input': '', 'output': a} for q, a in ANSWERS.items()]
    (folder / 'alpaca.json').write_text(json.dumps(lines))
    two = [*ANSWERS.items()][:2]
    turns = [
        {'role': role, 'content': text}
        for pair in two
        for role, text in zip(('user', 'assistant'), pair, strict=True)
    ]
    records = [{'messages': CALLING, 'tools': [WEATHER]}, {'messages': turns}]
    (folder / 'chats.jsonl').write_text('\n'.join(map(json.dumps, records)))


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('finetune')
    tokenizer = internlm_model(folder / 'tokenizer')
    write_conversations(folder / 'chat')
    data = {
        'path': str(folder / 'chat'),
        'chat_template': 'internlm2',
        'cache_dir': str(folder / 'cache'),
    }
    options = {
        f'{loader}.dataset.{key}': value
        for loader in ('train_dataloader', 'val_dataloader')
        for key, value in data.items()
    }
    sizes = dict(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4)
    options |= {f'model.{key}': value for key, value in sizes.items()}
    options |= {
        'model.vocab_size': tokenizer.vocab_size,
        'tokenizer.path': str(folder / 'tokenizer'),
        'load_from': None,
        'train_cfg.max_iters': 80,
        'train_cfg.global_batch_size': 2,
        'train_cfg.micro_batch_size': 1,
        'optim_wrapper.optimizer.lr': 8e-3,
        'default_hooks.evaluation.interval': 40,
        'default_hooks.checkpoint.interval': 80,
        'experiment_name': 'finetune',
    }
    config = load_config('internlm_tiny_sft', options)
    config.work_dir = str(folder / 'work')
    check_config(config)
    runner = LLMRunner.from_cfg(config)
    assert runner.tokenizer.hash == tokenizer.hash
    runner.train()
    assert runner.train_dataloader.dataset.domains == ['alpaca', 'chats']
    convert_to_hf(folder / 'work', folder / 'hf', dtype='float32')
    return folder


def test_the_checkpoint_answers_as_it_was_trained(run: Path) -> None:
    assert template_for(run / 'work') == 'internlm2'
    chat = Chat(from_pretrained(run / 'work'), template_for(run / 'work'))
    for question, answer in ANSWERS.items():
        assert chat.answer([{'role': 'user', 'content': question}], GREEDY) == answer
    hello, first = [*ANSWERS.items()][:2]
    messages = [
        {'role': 'user', 'content': hello[0]},
        {'role': 'assistant', 'content': hello[1]},
        {'role': 'user', 'content': first[0]},
    ]
    assert chat.answer(messages, GREEDY) == first[1]


def test_the_export_answers_in_transformers(run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / 'hf')
    model = AutoModelForCausalLM.from_pretrained(run / 'hf')

    def answer(messages, tools=None) -> str:
        ids = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_tensors='pt', return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=60, do_sample=False)[0]
        new = out[ids['input_ids'].shape[1] :]
        assert tokenizer.decode(new[-1:]) == '<|im_end|>'  # it stops by itself
        return tokenizer.decode(new[:-1])

    for question, expected in ANSWERS.items():
        assert answer([{'role': 'user', 'content': question}]) == expected
    call = (
        '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {"city": "x"}}<|action_end|>'
    )
    assert answer(CALLING[:1], [WEATHER]) == call
    assert answer(CALLING[:3], [WEATHER]) == 'It is 3.'


def test_its_tokens_go_to_internlm_and_back(run: Path) -> None:
    from internlm_mm.datasets import ConversationDataset

    options = dict(seq_len=256, shuffle=False, cache_dir=run / 'cache')
    dataset = ConversationDataset(
        run / 'chat', chat_template='internlm2', tokenizer=str(run / 'tokenizer'), **options
    )
    for name, file in zip(dataset.domains, dataset.files, strict=True):
        write_bin(run / f'bin/{name}/dataset.bin', samples_of(file))
    again = InternLMBinDataset(
        run / 'bin', vocab_size=dataset.vocab_size, packing='best_fit', **options
    )
    assert len(again) == len(dataset) and again.domains == dataset.domains
    for index in range(len(dataset)):
        assert again[index].input_ids.tolist() == dataset[index].input_ids.tolist()
        assert again[index].labels.tolist() == dataset[index].labels.tolist()
