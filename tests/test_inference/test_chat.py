"""Chat with a model that knows its lines, and with a double that remembers what it is given."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from internlm_mm.api import from_pretrained
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.inference import Chat, ChatPrompts, Sampling
from internlm_mm.tokenizers import build_template
from tests.chatting import FIRST, SECOND, THIRD
from tests.conversations import CALLING, TOOLS, internlm_model
from tests.trained import train_tokenizer

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled:UserWarning')


@pytest.fixture(scope='module')
def generator(chat_run):
    return from_pretrained(chat_run, device='cpu')


class Double:
    """Remembers prompts and samplings; answers with what it was told to."""

    add_bos = True
    pieces = ('a', '', 'b')

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked = []

    def stream_ids(self, prompt, sampling):
        self.asked.append((prompt, sampling))
        return iter(self.pieces)


@pytest.mark.parametrize('messages', [FIRST[:2], FIRST, SECOND, THIRD])
def test_what_was_learned_is_answered(generator, messages):
    chat = Chat(generator, 'internlm2')
    pieces = list(chat.stream(messages[:-1], Sampling(max_new_tokens=90)))
    assert ''.join(pieces) == messages[-1]['content']
    assert len(pieces) > 3
    assert chat.answer(messages[:-1]) == messages[-1]['content']


def test_the_system_prompt_by_default(generator):
    template = build_template({'type': 'internlm2', 'default_system': 'Shout.'})
    chat = Chat(generator, template)
    assert chat.answer(FIRST[:1]) == 'HELLO!'
    assert chat.answer([{'role': 'system', 'content': ''}, *FIRST[:1]]) == FIRST[1]['content']


def test_stops_are_tokens_where_there_are_tokens(tmp_path):
    double = Double(internlm_model(tmp_path))
    sampling = Sampling(stop_ids=(5,), stop=('END',), max_new_tokens=7)
    assert Chat(double, 'internlm').answer(FIRST[:1], sampling) == 'ab'
    eoa = double.tokenizer.token_id('<eoa>')
    (prompt, used) = double.asked[0]
    assert (used.stop_ids, used.stop, used.max_new_tokens) == ((5, eoa), ('END',), 7)
    assert prompt == [1, *prompt[1:]] and double.tokenizer.decode(prompt) == (
        '<|User|>:hello<eoh>\n<|Bot|>:'
    )


def test_stops_are_strings_where_there_are_none(tmp_path):
    double = Double(train_tokenizer(tmp_path))
    Chat(double, 'llama3').answer(FIRST[:1])
    assert double.asked[0][1].stop == ('<|eot_id|>', '<|eom_id|>')
    assert double.asked[0][1].stop_ids == ()


def test_prompts_without_bos_and_with_tools(tmp_path):
    double = Double(internlm_model(tmp_path))
    double.add_bos = False
    chat = Chat(double, {'type': 'internlm2'})
    template = build_template('internlm2')
    wanted = template.encode(
        double.tokenizer, CALLING[:4], TOOLS, add_generation_prompt=True, add_bos=False
    )
    assert chat.prompt(CALLING[:4], TOOLS) == wanted.ids
    chat.answer(CALLING[:4], tools=TOOLS)
    assert double.asked[0][0] == wanted.ids


def test_marks_are_called_as_the_template_calls_them(tmp_path):
    double = Double(internlm_model(tmp_path))
    double.pieces = ('I ', '[UNUSED_TOKEN_144][UNUSED_TOKEN_141]', '\n{}', '[UNUSED_TOKEN_143]')
    wanted = 'I <|action_start|><|plugin|>\n{}<|action_end|>'
    assert Chat(double, 'internlm2').answer(FIRST[:1]) == wanted
    assert Chat(double, 'internlm').answer(FIRST[:1]) == ''.join(double.pieces)


def test_what_cannot_be_answered(generator, tmp_path):
    with pytest.raises(ValueError, match='no chat template'):
        Chat(generator, 'none')
    with pytest.raises(ValueError, match='no tokenizer'):
        Chat(Double(None), 'chatml')
    chat = Chat(generator, 'internlm2')
    with pytest.raises(ValueError, match='nothing to answer'):
        chat.stream(FIRST)
    with pytest.raises(ValueError, match='there is none'):
        chat.answer([])
    with pytest.raises(ValueError, match='leaves no room in max_seq_len=192'):
        chat.answer([{'role': 'user', 'content': 'def f1(x)' * 99}])


@pytest.mark.parametrize('messages', [FIRST, SECOND])
def test_transformers_answers_the_same_from_an_export(chat_run, tmp_path, generator, messages):
    """Template, ids of marks and what ends an answer are all in the exported folder."""
    convert_to_hf(chat_run, tmp_path / 'hf', dtype='float32')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    inputs = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_tensors='pt', return_dict=True
    )
    assert inputs['input_ids'][0].tolist() == Chat(generator, 'internlm2').prompt(messages[:-1])
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    new = output[0, inputs['input_ids'].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == messages[-1]['content']
    assert tokenizer.convert_ids_to_tokens(new.tolist())[-1] == '<|im_end|>'


def test_prompts_are_those_of_a_chat(tmp_path):
    double = Double(internlm_model(tmp_path))
    for name in ('internlm2', 'chatml'):
        chat = Chat(double, name)
        prompts = ChatPrompts(build_template(name), double.tokenizer)
        assert prompts.encode(CALLING[:4], TOOLS) == chat.prompt(CALLING[:4], TOOLS)
        list(chat.stream(FIRST[:1], Sampling(stop=('x',)), TOOLS))
        prompt, sampling = double.asked[-1]
        assert prompts.encode(FIRST[:1], TOOLS) == prompt
        assert prompts.with_stops(Sampling(stop=('x',))) == sampling
    aliased = ChatPrompts(build_template('internlm2'), double.tokenizer)
    assert aliased.aliases and aliased.by_name('[UNUSED_TOKEN_144]x') == '<|action_start|>x'
