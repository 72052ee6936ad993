"""This project's models in `lm-evaluation-harness` (EleutherAI): tasks of others, measured by the fair measure.

In: requests of the harness. Out: log-likelihoods and continuations. Each text begins after one end-of-text token, as in
training and generation; one longer than the context is seen in windows that overlap by half. The package `lm_eval` is
needed only here. It registers its own models alone (0.4.13 reads no entry points), so its command is started from here:

    python -m slm_ray.evaluation.harness run --model slm_ray --model_args model=runs/NAME/best --tasks NAME

A program imports this module and says `get_model("slm_ray")`, or uses the entry point `slm_ray` of `lm_eval.models`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from slm_ray.evaluation.measurement import subject
from slm_ray.evaluation.scoring import Scorer
from slm_ray.generation.backend_choice import BackendName, make_backend
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams

MAX_TOKENS = 256
"""Most tokens to write where a task does not say."""


@register_model("slm_ray")
class SlmRayLM(LM):
    """A checkpoint or a registered version as a model of the harness."""

    def __init__(
        self,
        model: str = "models:/tinystories@champion",
        backend: BackendName = "torch",
        tracking_uri: str = "",
        batch_size: int | str | None = 1,
        **_: Any,
    ) -> None:
        """model: a reference as `evaluate.py` takes it; backend: what scores; batch_size: stories written at once.

        Other arguments of the harness (device, max_batch_size) have no meaning here.

        Raises:
            UserError: no such model, or the backend cannot run it.
        """
        super().__init__()
        with subject(model, tracking_uri) as found:
            self._tokenizer = found.tokenizer
            torch_model = found.model
        self._scorer = (
            Scorer.of_model(torch_model)
            if backend == "torch"
            else Scorer.of_backend(make_backend(torch_model, 1, backend))
        )
        said = str(batch_size or 1)  # or auto
        slots = max(int(said) if said.isdigit() else 1, 1)
        self._engine = Engine(make_backend(torch_model, slots), found.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache."""
        return self._tokenizer.sha256

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether greedy decoding would write it.

        Where both do not fit into the context, the newest tokens are seen.
        """
        texts, counted_from = [], []
        for request in requests:
            context, continuation = request.args
            before, whole = self._pair(context, continuation)
            n_wanted = len(whole) - len(before)
            text = [self._tokenizer.start_id, *whole][-max(self._scorer.seq_len, n_wanted) - 1 :]
            texts.append(np.array(text, np.int64))
            counted_from.append(len(text) - n_wanted)
        found = self._scorer.scored(texts, counted_from)
        return [
            (-float(scored.nats.sum()), bool(scored.is_likeliest[first - 1 :].all()))
            for scored, first in zip(found, counted_from)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of whole texts, without an end mark."""
        start_id = self._tokenizer.start_id
        texts = [np.array([start_id, *self._tokenizer.encode(request.args[0])], np.int64) for request in requests]
        return [-float(nats.sum()) for nats in self._scorer.nats(texts)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context up to one of its stop texts; of a long context the newest tokens are seen."""
        limit = self._scorer.seq_len - 1
        prompts: list[str | list[int]] = []
        params = []
        for request in requests:
            context, options = request.args
            tokens = self._tokenizer.encode(context)
            prompts.append(context if len(tokens) <= limit else tokens[-limit:])
            params.append(_sampling(options))
        return [completion.text for completion in self._engine.generate(prompts, params)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the context, and of both; spaces between them belong to what follows, as in training."""
        bare = context.rstrip()
        whole = self._tokenizer.encode(context + continuation)
        return self._tokenizer.encode(bare)[: len(whole)], whole


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    """How a task wants its continuations: greedily unless it says `do_sample`."""
    until = options.get("until") or ()
    is_random = bool(options.get("do_sample", options.get("temperature", 0) > 0))
    return SamplingParams(
        max_tokens=int(options.get("max_gen_toks", MAX_TOKENS)),
        temperature=float(options.get("temperature", 1.0)) if is_random else 0.0,
        top_k=int(options.get("top_k", 0)),
        top_p=float(options.get("top_p", 1.0)),
        stop=(until,) if isinstance(until, str) else tuple(stop for stop in until if stop),
        seed=0,
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
