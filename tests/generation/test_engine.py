"""The engine against naive loops: same tokens, same stories in any company, whole characters, bounded context."""

import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from slm_ray.generation.detokenizer import TextStream
from slm_ray.generation.engine import Engine, PromptError
from slm_ray.generation.engine_thread import EngineBusyError, EngineClosedError, EngineThread, Order
from slm_ray.generation.request import Completion, Request
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.tiny_model import talkative_model, without_end

SENTENCES = [
    "Once upon a time there was a little cat called Mia.",
    "The cat went to the forest and found a shiny stone.",
    "Tom and Mia played in the garden until the sun went down.",
]
GREEDY = SamplingParams(temperature=0, max_tokens=40)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(SENTENCES, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    return without_end(talkative_model(tokenizer), tokenizer)


@pytest.mark.parametrize("method", ["accept", "end_prompt"])
def test_ctrl_c_is_no_fault_of_a_request(
    model: Decoder, tokenizer: Tokenizer, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    engine = Engine(TorchBackend(model), tokenizer)
    engine.add(engine.request("Once", GREEDY))
    monkeypatch.setattr(Request, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()


def naive_greedy(model: Decoder, tokenizer: Tokenizer, prompt: str, count: int) -> list[int]:
    """Greedy decoding without a cache; a full window is cut to its newest half, as the engine does."""
    seq_len = model.config.seq_len
    window = [tokenizer.eos_id, *tokenizer.encode(prompt)]
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count:
            window = window if len(window) <= seq_len else window[-(seq_len // 2) :]
            token = int(model(torch.tensor([window]))[0, -1].argmax())
            if token == tokenizer.eos_id:
                break
            written.append(token)
            window.append(token)
    return written


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 2}, {"positions": "learned", "norm": "layer", "mlp": "gelu", "bias": True}]
)
def test_greedy_with_cache_equals_naive_loop_for_slots_of_different_lengths(
    tokenizer: Tokenizer, changes: dict[str, object]
) -> None:
    model = talkative_model(tokenizer, **changes)
    prompts = ["", "Once", "The cat went to the forest", "Tom and Mia played in the"]
    completions = Engine(TorchBackend(model), tokenizer).generate(prompts, [GREEDY] * 4)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.tokens) == naive_greedy(model, tokenizer, prompt, 40)
        assert completion.prompt_tokens == len(tokenizer.encode(prompt))


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16])
def test_story_goes_on_past_the_context(tokenizer: Tokenizer, seq_len: int) -> None:
    model = without_end(talkative_model(tokenizer, seq_len=seq_len), tokenizer)
    (completion,) = Engine(TorchBackend(model), tokenizer).generate([""], [GREEDY])
    if seq_len > 1:
        assert list(completion.tokens) == naive_greedy(model, tokenizer, "", 40)
    assert (len(completion.tokens), completion.finish_reason) == (40, "length")


def test_more_stories_than_slots_take_turns(model: Decoder, tokenizer: Tokenizer) -> None:
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * index) for index in range(7)]
    completions = Engine(TorchBackend(model, max_slots=2), tokenizer).generate(["Once"] * 7, params)
    longest = naive_greedy(model, tokenizer, "Once", 23)
    assert [list(completion.tokens) for completion in completions] == [longest[: 5 + 3 * i] for i in range(7)]


@pytest.mark.parametrize("params", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.9}, {"temperature": 1.5, "top_k": 3}])
def test_same_seed_writes_the_same_story_alone_and_in_company(
    model: Decoder, tokenizer: Tokenizer, params: dict[str, float]
) -> None:
    mine = SamplingParams(seed=7, max_tokens=60, **params)
    others = [SamplingParams(seed=seed, max_tokens=9 * seed + 4, top_k=5 * seed) for seed in range(6)]
    engine = Engine(TorchBackend(model), tokenizer)
    (alone,) = engine.generate(["The cat"], [mine])
    company = engine.generate([*["Once upon"] * 6, "The cat"], [*others, mine])
    assert company[-1] == alone
    assert len({completion.text for completion in company}) == 7


def test_fresh_seeds_differ_and_torchs_own_random_numbers_are_untouched(model: Decoder, tokenizer: Tokenizer) -> None:
    before = torch.random.get_rng_state()
    params = SamplingParams(max_tokens=30, temperature=1.0)
    first, second = Engine(TorchBackend(model), tokenizer).generate(["Once", "Once"], [params, params])
    assert first.text != second.text
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stops_at_the_end_of_text_token(tokenizer: Tokenizer) -> None:
    model = talkative_model(tokenizer)
    written = naive_greedy(without_end(talkative_model(tokenizer), tokenizer), tokenizer, "Once", 40)
    model.lm_head.weight.data.zero_()  # all tokens alike, so argmax takes id 0, which is the end-of-text token
    assert tokenizer.eos_id == 0 and written
    (completion,) = Engine(TorchBackend(model), tokenizer).generate(["Once"], [GREEDY])
    assert completion == Completion(
        text="", tokens=(), finish_reason="stop", prompt_tokens=len(tokenizer.encode("Once"))
    )


def test_training_mode_is_left_as_found_and_dropout_is_off(tokenizer: Tokenizer) -> None:
    model = talkative_model(tokenizer, dropout=0.5).train()
    first, second = (Engine(TorchBackend(model), tokenizer).generate(["Once"], [GREEDY]) for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())


def test_prompt_longer_than_the_context_is_refused_before_anything_runs(tokenizer: Tokenizer) -> None:
    engine = Engine(TorchBackend(talkative_model(tokenizer, seq_len=8)), tokenizer)
    words = "x" * 8
    with pytest.raises(PromptError, match="has 8 tokens and the context of this model holds 7"):
        engine.generate(["Once", words], [GREEDY] * 2)
    assert engine.is_idle
    (completion,) = engine.generate([words[:-1]], [SamplingParams(max_tokens=3, temperature=0)])
    assert completion.prompt_tokens == 7


def test_lone_surrogate_in_a_prompt_is_refused(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="no Unicode text"):
        Engine(TorchBackend(model), tokenizer).generate(["a\ud800"], [GREEDY])


def test_literal_end_of_text_token_in_a_prompt_is_plain_text(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(TorchBackend(model), tokenizer)
    (completion,) = engine.generate([f"one{END_OF_TEXT}two"], [GREEDY])
    assert completion.prompt_tokens > 10
    assert len(completion.tokens) == 40


def test_stream_joins_to_the_completion_and_frees_its_slot_when_closed(model: Decoder, tokenizer: Tokenizer) -> None:
    engine = Engine(TorchBackend(model, max_slots=1), tokenizer)
    params = SamplingParams(seed=3, max_tokens=200, temperature=2.0, top_k=0)
    (completion,) = engine.generate(["The"], [params])
    assert "".join(engine.stream("The", params)) == completion.text == tokenizer.decode(completion.tokens)
    stream = engine.stream("The", params)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.generate(["The"], [params]) == [completion]


def test_chunks_hold_whole_characters_and_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve 🦊🏽 fox\u200d — 猫 \ufffd end"
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer, tokenizer.encode("before"))
    chunks = [stream.push(token) for token in tokens]
    assert "".join(chunks) == text and stream.flush() == ""
    assert "🦊" in chunks  # four tokens, one chunk


def test_broken_characters_decode_as_the_tokenizer_does(tokenizer: Tokenizer) -> None:
    byte_tokens = tokenizer.encode("é🦊a猫")
    for tokens in itertools.permutations(byte_tokens[:6], 4):
        stream = TextStream(tokenizer, tokenizer.encode("x"))
        chunks = [stream.push(token) for token in tokens]
        assert "".join(chunks) + stream.flush() == tokenizer.decode(tokens)


# ---- the thread


@pytest.fixture
def thread(model: Decoder, tokenizer: Tokenizer) -> Iterator[EngineThread]:
    thread = EngineThread(Engine(TorchBackend(model, max_slots=2), tokenizer), max_waiting=3)
    yield thread
    thread.close()


def test_thread_answers_many_as_each_alone(thread: EngineThread, model: Decoder, tokenizer: Tokenizer) -> None:
    params = [SamplingParams(seed=seed, max_tokens=10 + seed) for seed in range(5)]
    futures = [thread.submit("The cat", own) for own in params]
    alone = [Engine(TorchBackend(model), tokenizer).generate(["The cat"], [own])[0] for own in params]
    assert [future.result(timeout=60) for future in futures] == alone


def test_thread_refuses_what_it_cannot_hold_and_cancelling_frees_it(thread: EngineThread) -> None:
    endless = SamplingParams(max_tokens=10**6, seed=0)
    with pytest.raises(PromptError):
        thread.submit("x" * 64, endless)
    futures = [thread.submit("Once", endless) for _ in range(5)]
    with pytest.raises(EngineBusyError):
        thread.submit("Once", endless)
    assert all(future.cancel() for future in futures)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # the engine sees it at its next token
        try:
            short = thread.submit("Once", SamplingParams(max_tokens=2, seed=0))
        except EngineBusyError:
            continue
        break
    assert short.result(timeout=60).finish_reason == "length"


def test_a_prompt_of_several_stories_is_read_once_and_not_at_all_where_there_is_no_room(
    thread: EngineThread, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read in the thread of the caller, which holds up everybody's answers."""
    read, encode = [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: read.append(text) or encode(self, text))
    short = SamplingParams(max_tokens=2, seed=0)
    futures = thread.submit_all([Order("Once", short), Order("Once", short), Order("Then", short)])
    assert read == ["Once", "Then"]
    assert len({future.result(timeout=60).text for future in futures[:2]}) == 1
    with pytest.raises(EngineBusyError):
        thread.submit_all([Order("Once", short)] * 6)
    assert read == ["Once", "Then"]


def test_thread_survives_a_failed_step(thread: EngineThread, model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model, "decode", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            thread.submit("Once", GREEDY).result(timeout=60)
    assert len(thread.submit("Once", GREEDY).result(timeout=60).tokens) == 40


def test_closed_thread_fails_what_is_unanswered(model: Decoder, tokenizer: Tokenizer) -> None:
    thread = EngineThread(Engine(TorchBackend(model), tokenizer))
    future = thread.submit("Once", SamplingParams(max_tokens=10**6))
    thread.close()
    with pytest.raises(EngineClosedError):
        future.result(timeout=60)
    with pytest.raises(EngineClosedError):
        thread.submit("Once", GREEDY)
