"""What a story gives besides its tokens: stop texts, chunks, log-probabilities; prompts as tokens; penalties."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.generation.detokenizer import StopTexts
from slm_ray.generation.engine import Engine, PromptError
from slm_ray.generation.engine_thread import EngineThread, Order
from slm_ray.generation.request import Chunk, Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import talkative_model, without_end

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["Tom and Mia played in the garden until the sun went down."] * 3, vocab_size=290)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return without_end(talkative_model(tokenizer), tokenizer)


@pytest.fixture
def engine(model: Decoder, tokenizer: Tokenizer) -> Engine:
    return Engine(TorchBackend(model), tokenizer)


def write(engine: Engine, prompt: str | list[int] = "Tom", **params: object) -> Completion:
    (completion,) = engine.generate([prompt], [SamplingParams(**{"max_tokens": 40, "seed": 4, "top_k": 0, **params})])  # type: ignore[arg-type]
    return completion


@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_are_found_in_chunks_as_in_the_whole(chunks: list[str], stops: list[str]) -> None:
    scanner = StopTexts(stops)
    given_text, is_stopped, fed = "", False, ""
    for chunk in chunks:
        fed += chunk
        sure, is_stopped = scanner.push(chunk)
        given_text += sure
        if is_stopped:
            break
    found = [fed.find(stop) for stop in stops if stop in fed]
    assert is_stopped == bool(found)
    assert given_text + scanner.flush() == (fed[: min(found)] if found else fed)


def test_text_that_cannot_begin_a_stop_text_is_given_at_once() -> None:
    scanner = StopTexts(["end."])
    assert [scanner.push(chunk)[0] for chunk in ("the e", "nd", "er", " en")] == ["the ", "", "ender", " "]
    assert scanner.flush() == "en"


def test_a_story_ends_before_its_stop_text(engine: Engine) -> None:
    whole = write(engine)
    stop = whole.text[5:9]
    completion = write(engine, stop=(stop, "never to be found"))
    assert completion.finish_reason == "stop"
    assert completion.text == whole.text[: whole.text.index(stop)]
    assert completion.tokens == whole.tokens[: len(completion.tokens)]
    assert (
        "".join(engine.stream("Tom", SamplingParams(max_tokens=40, seed=4, top_k=0, stop=(stop,)))) == completion.text
    )


def test_a_stop_text_begun_at_the_end_is_text(engine: Engine) -> None:
    whole = write(engine)
    assert write(engine, stop=(whole.text[-3:] + "more",)) == whole


def test_logprobs_are_those_of_the_model(engine: Engine, model: Decoder, tokenizer: Tokenizer) -> None:
    completion = write(engine, logprobs=3, prompt_logprobs=True, temperature=0.5, top_k=7, repetition_penalty=1.3)
    prompt = tokenizer.encode("Tom")
    ids = [tokenizer.eos_id, *prompt, *completion.tokens]
    with torch.no_grad():
        expected = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)  # (T, vocab_size)
    both = [*completion.prompt_logprobs, *completion.logprobs]
    assert [one.token for one in both] == ids[1:]
    np.testing.assert_allclose([one.logprob for one in both], expected[range(len(both)), ids[1:]], atol=1e-4)
    for one, row in zip(both, expected, strict=True):
        values, tokens = row.topk(3)
        assert [token for token, _, _ in one.top] == tokens.tolist()
        np.testing.assert_allclose([value for _, _, value in one.top], values, atol=1e-4)
    assert "".join(one.text for one in completion.logprobs if "\ufffd" not in one.text) in completion.text or any(
        "\ufffd" in one.text for one in completion.logprobs
    )


def test_no_logprobs_without_asking(engine: Engine) -> None:
    assert (write(engine).logprobs, write(engine).prompt_logprobs) == ((), ())


def test_a_prompt_alone_can_be_measured(engine: Engine, tokenizer: Tokenizer) -> None:
    completion = write(engine, max_tokens=0, prompt_logprobs=True)
    assert (completion.text, completion.tokens, completion.finish_reason) == ("", (), "length")
    assert [one.token for one in completion.prompt_logprobs] == tokenizer.encode("Tom")
    assert write(engine, prompt="", max_tokens=0, prompt_logprobs=True).prompt_logprobs == ()


def test_tokens_are_a_prompt_too_and_must_be_of_the_vocabulary(engine: Engine, tokenizer: Tokenizer) -> None:
    assert write(engine, prompt=tokenizer.encode("Tom")) == write(engine)
    for ids in ([tokenizer.vocab_size], [-1]):
        with pytest.raises(PromptError, match="is not one of the"):
            write(engine, prompt=ids)


def test_a_penalty_weighs_down_what_was_seen(engine: Engine) -> None:
    loose, strict = write(engine, temperature=0), write(engine, temperature=0, repetition_penalty=10.0)
    assert len(set(strict.tokens)) > len(set(loose.tokens))
    company = engine.generate(
        ["Mia", "Tom"], [GREEDY, SamplingParams(temperature=0, max_tokens=40, repetition_penalty=10.0)]
    )
    assert company[1] == strict


def test_the_thread_hands_out_chunks_before_the_future_is_done(engine: Engine) -> None:
    alone = write(engine, logprobs=1)
    thread = EngineThread(engine, max_chunks_per_s=float("inf"), least_chunk_s=0)
    chunks: list[Chunk] = []
    try:
        params = SamplingParams(max_tokens=40, seed=4, top_k=0, logprobs=1)
        assert thread.submit("Tom", params, chunks.append).result(timeout=60) == alone
    finally:
        thread.close()
    assert "".join(chunk.text for chunk in chunks) == alone.text
    assert tuple(one for chunk in chunks for one in chunk.logprobs) == alone.logprobs
    assert len(chunks) > 5


@pytest.mark.parametrize("pace", [{"max_chunks_per_s": 0.001}, {"max_chunks_per_s": 1e9, "least_chunk_s": 1000.0}])
@pytest.mark.parametrize("uptime_s", [0.0, 1e6])
def test_chunks_beyond_what_the_way_out_carries_come_together(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, uptime_s: float, pace: dict[str, float]
) -> None:
    """perf_counter often counts from the start of the machine: that must not make the first chunk wait."""
    clock, start = time.perf_counter, time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: clock() - start + uptime_s)
    thread = EngineThread(engine, **pace)
    chunks: list[list[Chunk]] = [[] for _ in range(3)]
    try:
        params = SamplingParams(max_tokens=40, seed=4, top_k=0, logprobs=1)
        completions = [thread.submit("Tom", params, own.append) for own in chunks]
        for completion, own in zip([one.result(timeout=60) for one in completions], chunks, strict=True):
            assert len(own) == 2  # the first at once, and the rest when the story was over
            assert own[0].text + own[1].text == completion.text
            assert own[0].logprobs + own[1].logprobs == completion.logprobs
    finally:
        thread.close()


def test_all_readers_chunks_come_at_the_same_moments(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second story begins at the first chunk of the first; both go on together, every fifth step."""
    steps, step = [0], engine.step
    monkeypatch.setattr(engine, "step", lambda: steps.append(steps[-1] + 1) or step())
    monkeypatch.setattr(time, "perf_counter", lambda: 0.01 * steps[-1])
    thread = EngineThread(engine, max_chunks_per_s=1e9, least_chunk_s=0.045)
    first, second, futures = [], [], []

    def begin(_: Chunk) -> None:
        if not first:
            futures.append(thread.submit("Tom", GREEDY, lambda _: second.append(steps[-1])))
        first.append(steps[-1])

    try:
        thread.submit("Mia", GREEDY, begin).result(timeout=60)
        futures[0].result(timeout=60)
    finally:
        thread.close()
    rounds = {first[0] + 5 * count for count in range(20)}
    assert len(first) > 4 and set(first[:-1]) <= rounds  # the last comes with the end
    assert len(second) > 4 and set(second[1:-1]) <= rounds


def test_readers_in_line_take_nothing_from_those_who_read(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk a second, and a step takes two: the one whose story is written gets each, however many wait."""
    engine = Engine(TorchBackend(model, max_slots=1), tokenizer)
    steps, step, chunks = [0], engine.step, list[int]()
    monkeypatch.setattr(engine, "step", lambda: steps.append(steps[-1] + 1) or step())
    monkeypatch.setattr(time, "perf_counter", lambda: 2.0 * steps[-1])
    thread = EngineThread(engine, max_chunks_per_s=1, least_chunk_s=0)
    short = SamplingParams(temperature=0, max_tokens=1)
    first = Order("Mia", GREEDY, lambda _: chunks.append(steps[-1]))
    try:
        futures = thread.submit_all([first, *[Order("Tom", short, lambda _: None)] * 30])
        futures[0].result(timeout=60)
    finally:
        thread.close()
    assert len(chunks) > 10  # not each step makes a character


def test_a_client_that_fails_loses_its_own_story_only(engine: Engine) -> None:
    def fail(_: Chunk) -> None:
        raise ValueError("the client is gone")

    thread = EngineThread(engine)
    try:
        broken = thread.submit("Tom", GREEDY, fail)
        assert len(thread.submit("Tom", GREEDY).result(timeout=60).tokens) == 40
        with pytest.raises(ValueError, match="the client is gone"):
            broken.result(timeout=60)
    finally:
        thread.close()


def test_closing_finishes_what_runs_when_it_is_given_time(engine: Engine) -> None:
    thread = EngineThread(engine)
    futures = [thread.submit("Tom", GREEDY) for _ in range(12)]
    thread.close(drain_s=60)
    assert all(len(future.result(timeout=0).tokens) == 40 for future in futures)


def test_a_story_that_only_measures_is_answered_though_the_step_fails(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(model)
    engine = Engine(backend, tokenizer)
    monkeypatch.setattr(backend, "decode", lambda _: 1 / 0)
    measured = engine.request("Tom", SamplingParams(max_tokens=0, prompt_logprobs=True))
    engine.add(measured)
    engine.add(engine.request("Tom", GREEDY))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    engine.drop_running()
    assert not engine.is_idle
    assert engine.step() == [measured]
    assert engine.is_idle


def test_a_cancelled_story_takes_two_steps_more_at_most(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(model)
    steps, later, whole = [0], threading.Event(), backend.decode

    def count(tokens: list[int]) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 5:
            assert future.cancel()
            later.set()
        return whole(tokens)

    monkeypatch.setattr(backend, "decode", count)
    thread = EngineThread(Engine(backend, tokenizer))
    try:
        future = thread.submit("Tom", SamplingParams(max_tokens=10**6, temperature=0))
        assert later.wait(60)
        assert len(thread.submit("Tom", SamplingParams(max_tokens=1, temperature=0)).result(timeout=60).tokens) <= 1
    finally:
        thread.close()
    assert steps[0] <= 8  # five, two, and the one of the other story


def test_a_failed_step_leaves_those_that_wait(
    model: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(model, max_slots=1)
    thread = EngineThread(Engine(backend, tokenizer))
    whole, calls = backend.decode, iter([True])

    def fail_once(tokens: list[int]) -> torch.Tensor:
        if next(calls, False):
            raise RuntimeError("no memory")
        return whole(tokens)

    monkeypatch.setattr(backend, "decode", fail_once)
    try:
        futures = [thread.submit("Tom", GREEDY) for _ in range(2)]
        with pytest.raises(RuntimeError, match="no memory"):
            futures[0].result(timeout=60)
        assert len(futures[1].result(timeout=60).tokens) == 40
    finally:
        thread.close()
