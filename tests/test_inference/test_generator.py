"""Generation against transformers, and against itself without a cache."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm_mm.checkpoint.huggingface import export_hf
from internlm_mm.inference import Generator, Sampling
from internlm_mm.models import InternLM

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, max_seq_len=256
)


class Letters:
    """Three bytes a token, so that characters are cut; 0 begins and 1 ends a text."""

    vocab_size, bos_id, eos_id, pad_id = 96, 0, 1, None

    def encode(self, text):
        return [2 + byte % 90 for byte in text.encode()]

    def decode(self, ids):
        return b''.join(
            '書'.encode()[i % 3 : i % 3 + 1] if i % 2 else bytes([65 + i % 26]) for i in ids
        ).decode(errors='replace')


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = InternLM(**SIZES).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return model


@pytest.fixture(scope='module')
def generator(model):
    return Generator(model, Letters())


def rows_of(generator, prompts, **options):
    steps = list(generator.generate_ids(prompts, Sampling(**options)))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


@pytest.fixture(scope='module')
def theirs(model, tmp_path_factory):
    """Transformers' model from an export of ours."""
    folder = tmp_path_factory.mktemp('export') / 'hf'
    export_hf(model, model.state_dict(), folder, dtype='float32')
    return AutoModelForCausalLM.from_pretrained(folder)


def generate_theirs(theirs, prompts, tokens, **options):
    """New tokens of transformers' generate, its prompts padded on the left."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {'do_sample': False, 'pad_token_id': 0, 'eos_token_id': None, **options}
    out = theirs.generate(padded, attention_mask=mask, max_new_tokens=tokens, **options)
    return out[:, longest:].tolist()


@pytest.mark.parametrize(
    'prompts', [[[5, 17, 60, 33]], [[5, 17, 60, 33], [7], [9] * 20, list(range(2, 40))]], ids=len
)
def test_greedy_equals_transformers(theirs, generator, prompts):
    ours = rows_of(generator, prompts, max_new_tokens=200)
    assert len(set(ours[0])) > 10  # not the same token over and over
    assert ours == generate_theirs(theirs, prompts, 200)


@pytest.mark.parametrize('penalty', [1.3, 0.8])
def test_repetition_penalty_equals_transformers(theirs, generator, penalty):
    prompts = [[5, 17, 60, 33, 33], [7], [9] * 20]
    # One by one: transformers would count what fills up a batch as a token of the prompt.
    expected = [
        generate_theirs(theirs, [prompt], 100, repetition_penalty=penalty)[0] for prompt in prompts
    ]
    ours = rows_of(generator, prompts, max_new_tokens=100, repetition_penalty=penalty)
    assert ours == expected
    assert ours != rows_of(generator, prompts, max_new_tokens=100)


def test_rows_of_different_lengths_do_not_touch(generator):
    prompts = [[5], [7, 8, 9, 10, 11, 12, 13], [3, 90, 44]]
    together = rows_of(generator, prompts, max_new_tokens=40)
    alone = [rows_of(generator, [prompt], max_new_tokens=40)[0] for prompt in prompts]
    assert together == alone


def test_cache_equals_the_whole_forward(model):
    ids = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(1))
    cache = model.make_cache(2, 30)
    with torch.inference_mode():
        parts = [model.logits(part, cache=cache) for part in ids.split([11, 1, 1, 17], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model.logits(ids))
        with pytest.raises(ValueError, match='31 tokens do not fit in a KV cache of 30'):
            model.logits(ids[:, :1], cache=cache)


def test_stop_ids_end_a_row_and_not_the_others(generator):
    free = rows_of(generator, [[5], [6, 7]], max_new_tokens=30)
    stop = next(token for token in free[0] if token not in free[1])
    ended = rows_of(generator, [[5], [6, 7]], max_new_tokens=30, stop_ids=(stop,))
    assert ended == [free[0][: free[0].index(stop)], free[1]]


def test_stream_joins_to_generate(generator):
    for text in ('abc', 'x'):
        sampling = Sampling(max_new_tokens=60)
        pieces = list(generator.stream(text, sampling))
        assert ''.join(pieces) == generator.generate([text], sampling)[0]
        assert len(pieces) > 5


def test_bos_begins_a_prompt_unless_told_otherwise(model, generator):
    sampling = Sampling(max_new_tokens=10)
    ids = Letters().encode('abc')
    for add_bos, prompt in ((True, [0, *ids]), (False, ids)):
        tokens = rows_of(generator, [prompt], max_new_tokens=10, stop_ids=(1,))[0]
        text = Generator(model, Letters(), add_bos).generate(['abc'], sampling)[0]
        assert text == Letters().decode(tokens)
    with pytest.raises(ValueError, match='a prompt is empty'):
        Generator(model, Letters(), add_bos=False).generate([''], sampling)


def test_same_seed_same_text(generator):
    options = dict(max_new_tokens=20, temperature=1.0)
    first, again, other = (rows_of(generator, [[5]], **options, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_room(generator):
    assert len(rows_of(generator, [[5] * 250], max_new_tokens=50)[0]) == 6
    with pytest.raises(ValueError, match='256 tokens leaves no room in max_seq_len=256'):
        rows_of(generator, [[5] * 256])
    with pytest.raises(ValueError, match='a prompt is empty'):
        rows_of(generator, [[]])
    assert generator.generate([]) == []


def test_a_long_row_takes_no_room_from_a_short_one(generator):
    prompts = [[5] * 250, [7, 8], [9] * 200]
    alone = [rows_of(generator, [prompt], max_new_tokens=80)[0] for prompt in prompts]
    assert [len(row) for row in alone] == [6, 80, 56]
    assert rows_of(generator, prompts, max_new_tokens=80) == alone


def test_a_row_ends_when_it_is_told_to(generator):
    prompts = [[5], [6, 7]]
    free = rows_of(generator, prompts, max_new_tokens=30)
    told = []

    def ends(row, token):
        told.append((row, token))
        return row == 0 and len(told) > 8

    steps = list(generator.generate_ids(prompts, Sampling(max_new_tokens=30), ends))
    rows = [[t for t in row if t is not None] for row in zip(*steps, strict=True)]
    assert rows == [free[0][:5], free[1]]
    assert told == [
        (row, token)
        for step in zip(free[0][:5] + [None] * 25, free[1], strict=True)
        for row, token in enumerate(step)
        if token is not None
    ]


def test_stop_strings_end_each_row_where_its_text_has_them(generator):
    prompts = ['abc', 'x', 'hello']
    free = generator.generate(prompts, Sampling(max_new_tokens=60))
    stops = (free[0][7:10], free[1][20:22])
    sampling = Sampling(max_new_tokens=60, stop=stops)
    expected = [
        text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
        for text in free
    ]
    assert expected[0] != free[0] and expected[1] != free[1]
    assert generator.generate(prompts, sampling) == expected
    assert ''.join(generator.stream('abc', sampling)) == expected[0]
    with pytest.raises(ValueError, match='is for texts; give tokens as stop_ids'):
        generator.generate_ids([[5]], sampling)


def test_generation_stops_computing_at_a_stop_string(model):
    class Counting:
        """The model, counting its steps."""

        def __init__(self):
            self.steps = 0

        def __getattr__(self, name):
            return getattr(model, name)

        def hidden_states(self, *args):
            self.steps += 1
            return model.hidden_states(*args)

    counting = Counting()
    generator = Generator(counting, Letters())
    text = generator.generate(['abc'], Sampling(max_new_tokens=60))[0]
    assert counting.steps == 60
    counting.steps = 0
    generator.generate(['abc'], Sampling(max_new_tokens=60, stop=(text[5:7],)))
    assert counting.steps < 30


def test_tokens_of_a_prompt_are_taken_as_they_are(generator):
    ids = [0, *Letters().encode('abc')]
    sampling = Sampling(max_new_tokens=20)
    assert ''.join(generator.stream_ids(ids, sampling)) == generator.generate(['abc'], sampling)[0]


def test_rows_of_a_batch_are_stretched_each_by_its_own_length(tmp_path):
    """Dynamic rotary embeddings: as transformers has it for each prompt alone."""
    scaling = dict(rope_type='dynamic', factor=4.0, original_max_position_embeddings=16)
    model = InternLM(**SIZES, rope_theta=50.0, rope_scaling=scaling).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    export_hf(model, model.state_dict(), tmp_path / 'hf', dtype='float32')
    prompts = [[5, 9, 3], [7] * 30 + [11] * 10, list(range(2, 22))]
    found = rows_of(Generator(model, Letters()), prompts, max_new_tokens=60)
    for prompt, row in zip(prompts, found, strict=True):
        # Read anew each time: it remembers how long the longest text was.
        other = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
        assert row == generate_theirs(other, [prompt], 60)[0]
    plain = InternLM(**SIZES, rope_theta=50.0).eval()
    plain.load_state_dict(model.state_dict())
    assert rows_of(Generator(plain, Letters()), prompts, max_new_tokens=60) != found


def test_texts_know_whether_they_are_whole(generator):
    prompts = [[5, 7, 9], [11, 13]]
    long = generator.continue_ids(prompts, Sampling(max_new_tokens=12))
    assert [text.whole for text in long] == [False, False] and long[0] != long[1]
    for length in range(1, len(long[0]) + 1):  # the last one ends with the room itself
        stop = long[0][-length:]
        until = generator.continue_ids(prompts, Sampling(max_new_tokens=12, stop=(stop,)))
        assert until[0] == long[0].partition(stop)[0] and until[0].whole
        assert until[1].whole is (stop in long[1])
    ids = rows_of(generator, prompts[:1], max_new_tokens=12)[0]
    end = next(token for place, token in enumerate(ids) if place and token not in ids[:place])
    stopping = Sampling(max_new_tokens=12, stop_ids=(end,))
    assert generator.continue_ids(prompts[:1], stopping)[0].whole
