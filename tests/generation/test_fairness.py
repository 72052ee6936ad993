"""What one request asks for, or does wrong, is not paid for by the others."""

import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.generation import engine as engine_module
from slm_ray.generation import request as request_module
from slm_ray.generation.detokenizer import TextStream
from slm_ray.generation.engine import PROMPT_TOKENS_PER_STEP, Engine, PromptError
from slm_ray.generation.engine_thread import EngineBusyError, EngineError, EngineThread, Order
from slm_ray.generation.logprobs import token_logprobs
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import talkative_model, without_end

LONG = 256


class PanicError(BaseException):
    """As a panic of the Rust side, which no `except Exception` sees."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Tom and Mia played in the garden until the sun went down."] * 3, vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return without_end(talkative_model(tokenizer, seq_len=LONG), tokenizer)


class Pieces:
    """Stands for a tokenizer whose texts do not matter."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [str(token) for token in ids]


def test_logprobs_of_a_long_prompt_take_little_memory() -> None:
    logits = np.random.default_rng(0).normal(size=(511, 50_257)).astype(np.float32)
    tracemalloc.start()
    token_logprobs(logits, list(range(511)), 20, Pieces())  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20  # 400 MB where whole rows are sorted in float64


@given(st.integers(1, 40), st.integers(2, 70), st.integers(0, 20), st.integers(0, 5))
def test_logprobs_are_those_of_a_sort_in_float64(n_rows: int, vocab_size: int, n_top: int, levels: int) -> None:
    random = np.random.default_rng(n_rows)
    logits = random.normal(size=(n_rows, vocab_size)).astype(np.float32)
    logits = logits.round() if levels else logits  # with equal ones among them
    tokens = random.integers(0, vocab_size, n_rows).tolist()
    wide = logits.astype(np.float64)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    order = np.argsort(-wide, axis=1, kind="stable")[:, :n_top]
    found = token_logprobs(logits, tokens, n_top, Pieces())  # type: ignore[arg-type]
    np.testing.assert_allclose([one.logprob for one in found], wide[range(n_rows), tokens], atol=1e-5)
    assert [[token for token, _, _ in one.top] for one in found] == order.tolist()


def test_so_many_prompt_tokens_are_read_between_two_tokens_and_no_more(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(model)
    engine, read, pauses = Engine(backend, tokenizer), [0], []
    prefill, decode = backend.prefill, backend.decode

    def count(slot: int, tokens: Sequence[int], **options: Any) -> Any:
        read[0] += len(tokens)
        return prefill(slot, tokens, **options)

    def note(tokens: Sequence[int]) -> Any:
        pauses.append(read[0])
        read[0] = 0
        return decode(tokens)

    engine.add(engine.request("Tom", SamplingParams(max_tokens=200)))
    engine.step()
    monkeypatch.setattr(backend, "prefill", count)
    monkeypatch.setattr(backend, "decode", note)
    for _ in range(7):
        engine.add(engine.request([5] * (LONG - 1), SamplingParams(max_tokens=LONG)))
    while not engine.is_idle:
        engine.step()
    assert max(pauses) <= PROMPT_TOKENS_PER_STEP <= 128  # 7 x 255 in one pause before; 8 x 128 where all are full
    assert sum(pauses) >= 7 * (LONG - 1)


@pytest.mark.parametrize("most", [1, 5, 30])
def test_prompts_that_are_read_in_parts_give_the_same_stories(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    model = without_end(talkative_model(tokenizer, seq_len=24), tokenizer)
    prompts = ["", "Tom", "Mia played in the garden", "Tom and Mia played", "down", "the sun went down."]
    params = [
        SamplingParams(seed=10 + seed, max_tokens=20 + 7 * seed, logprobs=2, prompt_logprobs=seed % 2 == 0)
        for seed in range(6)
    ]
    alone = [Engine(TorchBackend(model), tokenizer).generate([p], [own])[0] for p, own in zip(prompts, params)]
    monkeypatch.setattr(engine_module, "PROMPT_TOKENS_PER_STEP", most)
    together = Engine(TorchBackend(model, max_slots=3), tokenizer).generate(prompts, params)
    for one, other in zip(together, alone, strict=True):
        assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
        assert [p.token for p in one.prompt_logprobs] == [p.token for p in other.prompt_logprobs]
        np.testing.assert_allclose(
            [p.logprob for p in one.prompt_logprobs], [p.logprob for p in other.prompt_logprobs], atol=1e-4
        )


@pytest.fixture
def thread(model: Decoder, tokenizer: Tokenizer) -> Iterator[EngineThread]:
    thread = EngineThread(Engine(TorchBackend(model, max_slots=1), tokenizer), max_waiting=3)
    yield thread
    thread.close()


def test_a_prompt_that_no_context_holds_is_not_read_to_count_it(
    tokenizer: Tokenizer, model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(TorchBackend(model), tokenizer)
    read: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: read.append(len(text)) or encode(self, text))
    for text in ("a" * 64_000, " " * 64_000, "猫" * 21_000):
        with pytest.raises(PromptError, match=f"more tokens than the {LONG - 1}"):
            engine.request(text, SamplingParams())
    assert read == []
    with pytest.raises(PromptError, match="shorten it"):
        engine.request("a" * LONG, SamplingParams())


class Decoding:
    """A tokenizer, and how many tokens it was asked to decode at most."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.most = 0
        self._tokenizer = tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids)

    @property
    def own_texts(self) -> dict[int, str]:
        return self._tokenizer.own_texts


@given(st.lists(st.integers(1, 256) | st.sampled_from([250, 251, 252]), max_size=150))
def test_broken_characters_do_not_pile_up(tokenizer: Tokenizer, ids: list[int]) -> None:
    """What is held back is decoded at each token: of 2,048 bytes that form no character, 1.2 s that everyone waits."""
    decoding = Decoding(tokenizer)
    stream = TextStream(decoding, ())  # type: ignore[arg-type]
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert decoding.most <= 40


def test_cancelled_stories_leave_the_line(thread: EngineThread) -> None:
    endless = SamplingParams(max_tokens=10**6)
    running = thread.submit("Tom", endless)
    for _ in range(200):
        try:
            thread.submit("Tom", endless).cancel()
        except EngineBusyError:
            continue
        assert len(thread._engine._line.waiting) + len(thread._arrived) <= 4
    deadline = time.monotonic() + 60
    while thread.load.waiting:  # none of them holds a place for long
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(thread.submit_all([Order("Tom", endless)] * 3)) == 3
    assert not running.done()


def test_cancelled_requests_leave_the_line_of_the_engine_at_its_next_step(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(TorchBackend(model, max_slots=1), tokenizer)
    requests = [engine.request("Tom", SamplingParams(max_tokens=10**6)) for _ in range(50)]
    for request in requests:
        engine.add(request)
    engine.step()
    for request in requests[1:]:
        request.is_cancelled = True
    engine.step()
    assert len(engine._line.waiting) == 0 and engine.running == 1


def test_several_are_taken_together_or_none(thread: EngineThread) -> None:
    endless = SamplingParams(max_tokens=10**6)
    with pytest.raises(EngineBusyError):
        thread.submit_all([Order("Tom", endless)] * 5)
    assert (thread.load.running, thread.load.waiting) == (0, 0)
    assert len(thread.submit_all([Order("Tom", endless)] * 4)) == 4


def test_a_storys_own_fault_ends_that_story_only(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: object) -> None:
        raise PanicError("index out of bounds")

    monkeypatch.setattr(request_module, "token_logprobs", panic)
    thread = EngineThread(Engine(TorchBackend(model), tokenizer))
    try:
        good = thread.submit("Tom", SamplingParams(max_tokens=30, temperature=0))
        bad = [
            thread.submit("Tom", SamplingParams(max_tokens=30, logprobs=1)),
            thread.submit("Tom", SamplingParams(max_tokens=0, prompt_logprobs=True)),
        ]
        for one in bad:
            with pytest.raises(EngineError, match="index out of bounds"):
                one.result(timeout=60)
        assert len(good.result(timeout=60).tokens) == 30
        assert len(thread.submit("Tom", SamplingParams(max_tokens=3)).result(timeout=60).tokens) == 3
    finally:
        thread.close()


def test_a_panic_of_the_backend_does_not_end_the_thread(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, done = TorchBackend(model), threading.Event()
    thread, decode = EngineThread(Engine(backend, tokenizer)), backend.decode

    def panic(tokens: Sequence[int]) -> Any:
        if done.is_set():
            return decode(tokens)
        done.set()
        raise PanicError("no memory")

    monkeypatch.setattr(backend, "decode", panic)
    try:
        with pytest.raises(EngineError, match="no memory"):
            thread.submit("Tom", SamplingParams(max_tokens=3)).result(timeout=60)
        assert thread.failures == 1
        assert thread.submit("Tom", SamplingParams(max_tokens=3)).result(timeout=60).tokens
        assert thread.failures == 0
    finally:
        thread.close()
