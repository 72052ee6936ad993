"""Each target once, after the right context, and the same loss in any company."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm_ray.dataset.story_windows import windows_of
from slm_ray.evaluation.scoring import Scorer
from slm_ray.generation.backend_choice import make_backend
from slm_ray.model.decoder import Decoder
from slm_ray.model.threads import torch_threads
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.tiny_model import talkative_model


@given(n_tokens=st.integers(1, 300), seq_len=st.integers(1, 40), data=st.data())
def test_windows_count_every_target_once_and_hold_the_context(n_tokens: int, seq_len: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, seq_len))
    windows = list(windows_of(0, n_tokens, seq_len=seq_len, stride=stride))
    counted = [place for window in windows for place in range(window.first, window.stop + 1)]
    assert counted == list(range(1, n_tokens))
    assert all(window.stop - window.start <= seq_len for window in windows)
    assert all(window.first - window.start > seq_len - stride for window in windows if window.start)


def test_windows_of_the_example() -> None:
    found = [(w.start, w.first, w.stop) for w in windows_of(0, 8, seq_len=4, stride=2)]
    assert found == [(0, 1, 4), (2, 5, 6), (4, 7, 7)]


def texts_of(vocab_size: int, lengths: list[int]) -> list["np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    random = np.random.default_rng(3)
    return [random.integers(0, vocab_size, length) for length in lengths]


def naive(model: Decoder, text: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> list[float]:
    """One target at a time: the whole context where it fits, else the window that begins at a multiple of half."""
    seq_len, stride, nats = model.config.seq_len, model.config.seq_len // 2, []
    for place in range(1, len(text)):
        start = 0 if place <= seq_len else -(-(place - seq_len) // stride) * stride
        with torch.no_grad():
            logits = model(torch.from_numpy(text[None, start:place]))[0, -1].double()
        nats.append(-logits.log_softmax(-1)[text[place]].item())
    return nats


def test_each_loss_is_that_of_its_own_beginning(tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer, seq_len=16)
    texts = texts_of(tiny_tokenizer.vocab_size, [2, 5, 16, 17, 18, 24, 25, 50])
    for text, nats in zip(texts, Scorer.of_model(model).nats(texts)):
        assert nats == pytest.approx(naive(model, text), abs=2e-5)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_loss_is_the_same_in_any_company_to_the_last_digit(
    tiny_tokenizer: Tokenizer, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = talkative_model(tiny_tokenizer, seq_len=64)
    scorer = Scorer.of_model(model) if backend == "torch" else Scorer.of_backend(make_backend(model, 1, "onnx"))
    texts = texts_of(tiny_tokenizer.vocab_size, [3, 200, 64, 65, 31, 33, 90, 17, 16, 64, 40])
    together = scorer.nats(texts)
    monkeypatch.setattr("slm_ray.evaluation.scoring.MAX_LOGITS", 1)
    apart = [scorer.nats([text])[0] for text in reversed(texts)][::-1]
    assert all((ours == alone).all() for ours, alone in zip(together, apart))


def test_the_number_of_threads_does_not_show(tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer, seq_len=64)
    texts = texts_of(tiny_tokenizer.vocab_size, [200] * 40)
    found = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            found.append(np.concatenate(Scorer.of_model(model).nats(texts)))
            assert torch.get_num_threads() == threads
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_backends_agree(tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer, seq_len=32)
    texts = texts_of(tiny_tokenizer.vocab_size, [3, 100, 32, 33])
    by_torch = Scorer.of_model(model).nats(texts)
    by_onnx = Scorer.of_backend(make_backend(model, 1, "onnx")).nats(texts)
    assert np.concatenate(by_onnx) == pytest.approx(np.concatenate(by_torch), abs=2e-5)


def test_what_is_context_alone_has_no_loss(tiny_tokenizer: Tokenizer) -> None:
    scorer = Scorer.of_model(talkative_model(tiny_tokenizer, seq_len=16))
    texts = texts_of(tiny_tokenizer.vocab_size, [50, 20, 4])
    whole = scorer.nats(texts)
    part = [found.nats for found in scorer.scored(texts, [30, 20, 1])]
    assert (part[0][:29] == 0).all() and (part[0][29:] == whole[0][29:]).all()
    assert (part[1] == 0).all()
    assert (part[2] == whole[2]).all()


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_the_likeliest_tokens_are_those_that_greedy_decoding_takes(tiny_tokenizer: Tokenizer, backend: str) -> None:
    model = talkative_model(tiny_tokenizer, seq_len=32)
    scorer = Scorer.of_model(model) if backend == "torch" else Scorer.of_backend(make_backend(model, 1, "onnx"))
    text = [5]
    for _ in range(12):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    other = [*text[:6], (text[6] + 1) % tiny_tokenizer.vocab_size, *text[7:]]
    greedy, not_greedy = scorer.scored([np.array(text), np.array(other)], [1, 1])
    assert greedy.is_likeliest.all()
    assert not_greedy.is_likeliest[:5].all() and not not_greedy.is_likeliest[5]


def test_a_model_in_training_is_left_as_it_was(tiny_tokenizer: Tokenizer) -> None:
    model = talkative_model(tiny_tokenizer, seq_len=16, dropout=0.5)
    texts = texts_of(tiny_tokenizer.vocab_size, [10])
    at_rest = Scorer.of_model(model).nats(texts)[0]
    model.train()
    assert (Scorer.of_model(model).nats(texts)[0] == at_rest).all()
    assert model.training
