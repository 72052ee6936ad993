"""Biases and penalties against a naive loop, at their edges, and in the stories of an engine."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_ray.generation.engine import BiasError, Engine, PromptError
from slm_ray.generation.request import Completion
from slm_ray.generation.sampling import SamplingParams, draw
from slm_ray.generation.token_weights import TokenWeights, token_weights, weighed
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import talkative_model, without_end

VOCAB_SIZE = 9
TOKENS = st.integers(0, VOCAB_SIZE - 1)
SETTINGS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([0.5, 1.0]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 2.0, -0.3]),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, 100.0, 0.5])).map(lambda biases: tuple(biases.items())),
)
ROWS = st.lists(st.tuples(SETTINGS, st.lists(TOKENS, max_size=4), st.lists(TOKENS, max_size=6)), min_size=1, max_size=5)


def weights_of(params: SamplingParams, prompt: list[int], written: list[int]) -> TokenWeights | None:
    weights = token_weights(params, prompt)
    for token in written:
        if weights is not None:
            weights.add(token)
    return weights


def naive(logits: list[float], params: SamplingParams, prompt: list[int], written: list[int]) -> list[float]:
    values, count = list(logits), Counter(written)
    for token, bias in params.logit_bias:
        values[token] += bias
    for token in {*prompt, *written}:
        penalty = params.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in count:
        values[token] -= params.frequency_penalty * count[token] + params.presence_penalty
    return values


@settings(max_examples=100, deadline=None)
@given(ROWS, st.integers(0, 2**32 - 1))
def test_rows_are_weighed_as_by_a_loop_and_drawn_as_each_alone(
    rows: list[tuple[SamplingParams, list[int], list[int]]], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (len(rows), VOCAB_SIZE)).astype(np.float32)
    before, uniforms = logits.copy(), generator.random(len(rows)).tolist()
    weights = [weights_of(*row) for row in rows]
    got = weighed(logits, weights)
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_allclose(got, [naive(own.tolist(), *row) for own, row in zip(logits, rows)], rtol=1e-5, atol=1e-5)
    params = [row[0] for row in rows]
    alone = [
        draw(weighed(own[None], [weight]), [one], [uniform])[0]
        for own, weight, one, uniform in zip(logits, weights, params, uniforms)
    ]
    assert draw(got, params, uniforms) == alone


def test_without_weights_the_logits_are_not_even_copied() -> None:
    logits = np.zeros((2, 4), dtype=np.float32)
    assert token_weights(SamplingParams(min_p=0.5, top_p=0.5), [1, 2]) is None
    assert weighed(logits, [None, None]) is logits


def test_the_end_of_a_long_story_is_counted_too() -> None:
    written = [token % 1000 for token in range(2500)]
    weights = weights_of(SamplingParams(presence_penalty=1), [5, 5, 7], written)
    assert weights is not None
    assert dict(zip(weights.ids.tolist(), weights.counts.tolist(), strict=True)) == Counter(written)
    assert weights_of(SamplingParams(presence_penalty=1), [5], []).counts.tolist() == [0]  # type: ignore[union-attr]


@pytest.mark.parametrize("bias", [-100.0, 100.0])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_k": 0}, {"top_k": 3}, {"top_k": 0, "top_p": 0.8}])
def test_a_bias_of_every_token_changes_nothing(params: dict[str, float], bias: float) -> None:
    plain = SamplingParams(**params)  # type: ignore[arg-type]
    biased = SamplingParams(**params, logit_bias=tuple((token, bias) for token in range(6)))  # type: ignore[arg-type]
    logits = np.array([[1, 3, 0.5, 2, -1, -7]] * 20, dtype=np.float32)
    uniforms = [(row + 0.5) / 20 for row in range(20)]
    own = weighed(logits, [weights_of(biased, [], [])] * 20)
    assert draw(own, [biased] * 20, uniforms) == draw(logits, [plain] * 20, uniforms)


def test_a_penalty_moves_the_likeliest_token_as_openai_says() -> None:
    logits = np.array([[2.0, 1.5, 0.0]], dtype=np.float32)

    def greedy(written: list[int], **options: float) -> int:
        params = SamplingParams(temperature=0, **options)  # type: ignore[arg-type]
        return draw(weighed(logits, [weights_of(params, [0, 0, 0], written)]), [params], [0.0])[0]

    assert greedy([], presence_penalty=2, frequency_penalty=2) == 0  # the prompt does not count
    assert greedy([0], presence_penalty=0.4) == greedy([0], frequency_penalty=0.4) == 0
    assert greedy([0], presence_penalty=0.6) == greedy([0, 0], frequency_penalty=0.3) == 1
    assert greedy([0, 0], presence_penalty=0.4) == 0  # once, however often
    assert greedy([2], presence_penalty=-2, frequency_penalty=-0.1) == 2


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([[2.0, -1.0, 1.5, -1.2]], dtype=np.float32)
    params = SamplingParams(temperature=0, repetition_penalty=2.0)

    def greedy(logits: np.ndarray, prompt: list[int]) -> list[int]:
        return draw(weighed(logits, [token_weights(params, prompt)]), [params], [0.0])

    assert greedy(logits, [0]) == [2]  # 1, -1, 1.5, -1.2
    assert greedy(logits, [0, 2, 2]) == [0]  # 1, -1, 0.75, -1.2
    assert greedy(-logits, [1, 3]) == [3]  # -2, 0.5, -1.5, 0.6


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Tom and Mia played in the garden until the sun went down."] * 3, vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return without_end(talkative_model(tokenizer), tokenizer)


def write(model: Decoder, tokenizer: Tokenizer, **params: object) -> Completion:
    sampling = SamplingParams(**{"max_tokens": 40, "temperature": 0, **params})  # type: ignore[arg-type]
    company = [SamplingParams(seed=1), sampling, SamplingParams(seed=2)]
    return Engine(TorchBackend(model), tokenizer).generate(["Mia", "Tom", "Mia"], company)[1]


def test_stories_obey_them_and_their_log_probabilities_stay_the_models(model: Decoder, tokenizer: Tokenizer) -> None:
    plain = write(model, tokenizer, logprobs=1)
    banned = {plain.tokens[0], plain.tokens[1]}
    without = write(model, tokenizer, logit_bias=tuple((token, -100.0) for token in banned), logprobs=1)
    assert not banned & set(without.tokens)
    assert without.logprobs[0].top == plain.logprobs[0].top  # of the model, which would have taken the banned one
    wanted = tokenizer.encode("x")[0]
    assert set(write(model, tokenizer, logit_bias=((wanted, 100.0),)).tokens) == {wanted}
    strict = write(model, tokenizer, presence_penalty=2, frequency_penalty=2)
    assert max(Counter(strict.tokens).values()) < max(Counter(plain.tokens).values())
    loose = write(model, tokenizer, frequency_penalty=-2)
    assert max(Counter(loose.tokens).values()) >= max(Counter(plain.tokens).values())


def test_a_bias_of_a_token_that_the_model_does_not_have_is_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    with pytest.raises(BiasError, match=f"token {size} is not one of the {size} of this model"):
        write(model, tokenizer, logit_bias=((size, 1.0),))


def test_a_prompt_that_may_be_cut_is_read_from_its_newest_half_context(model: Decoder, tokenizer: Tokenizer) -> None:
    engine, params = Engine(TorchBackend(model), tokenizer), SamplingParams(temperature=0, max_tokens=5)
    seq_len = model.config.seq_len
    for text in ("Tom and Mia. " * 40, "Tom and Mia. " * 4000, "x" * seq_len):
        newest = tokenizer.encode(text[-1000:])[-(seq_len // 2) :]
        request = engine.request(text, params, may_cut=True)
        assert request.last_tokens(10**6)[1:] == newest
        with pytest.raises(PromptError, match="tokens"):
            engine.request(text, params)
    whole = "x" * (seq_len - 1)
    assert engine.request(whole, params, may_cut=True).prompt_tokens == seq_len - 1
