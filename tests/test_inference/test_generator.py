"""Generation against transformers, and against itself without a cache."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.inference import Generator, Sampling
from internlm_mm.inference.generator import draw
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


def test_greedy_equals_transformers(model, generator):
    config = {k: v for k, v in model.hf_config().items() if k != 'architectures'}
    hf = LlamaForCausalLM(LlamaConfig(**config, eos_token_id=None)).eval()
    hf.load_state_dict(
        {
            ('' if n.startswith('lm_head') else 'model.') + n: p
            for n, p in model.state_dict().items()
        }
    )
    prompt = [5, 17, 60, 33]
    ours = rows_of(generator, [prompt], max_new_tokens=200)[0]
    ids = torch.tensor([prompt])
    theirs = hf.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=False,
        pad_token_id=0,
    )
    assert len(set(ours)) > 10  # not the same token over and over
    assert ours == theirs[0, 4:].tolist()


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


def test_draw_follows_the_distribution():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        tokens = draw(logits, Sampling(**options), generator)
        return torch.bincount(tokens, minlength=4) / len(tokens)

    def near(expected, **options):
        expected = torch.tensor(expected)
        # 20,000 draws: four standard deviations are at most 0.0142.
        torch.testing.assert_close(
            frequencies(**options), expected / expected.sum(), rtol=0, atol=0.0142
        )

    near([0.5, 0.3, 0.15, 0.05], temperature=1.0)
    near([0.25, 0.09, 0.0225, 0.0025], temperature=0.5)
    near([0.5, 0.3, 0.0, 0.0], temperature=1.0, top_k=2)
    near([0.5, 0.3, 0.0, 0.0], temperature=1.0, top_p=0.8)
    near([0.5, 0.3, 0.15, 0.0], temperature=1.0, top_p=0.81)
    near([1.0, 0.0, 0.0, 0.0], temperature=1.0, top_p=0.01)
    assert frequencies(temperature=0.0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    'wrong', [dict(max_new_tokens=0), dict(temperature=-1.0), dict(top_k=0), dict(top_p=0.0)]
)
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
