"""How many stories of a model hold together: for the tries of the demo, in the bench of learning.

In: a trained model and its data set. Out: the share of stories whose hero, pronouns, thing and cast are kept (the
corpus's own check), and the longest span copied from the training stories, as a share of a story.
"""

from typing import Any

from slm_ray.corpus.consistency import thread_of
from slm_ray.dataset.manifest import load_manifest
from slm_ray.evaluation.copied_spans import CopiedSpans
from slm_ray.evaluation.stories import read_stories
from slm_ray.generation.engine import Engine
from slm_ray.generation.sampling import SamplingParams
from slm_ray.generation.torch_backend import TorchBackend
from slm_ray.model.decoder import Decoder
from slm_ray.tokenization.tokenizer import Tokenizer

PROMPT = "Once upon a time"
MAX_TOKENS = 400


def written(model: Decoder, tokenizer: Tokenizer, data: str, count: int) -> dict[str, Any]:
    """Write so many stories as the demo does, with seeds 1, 2, ..., and check each."""
    engine = Engine(TorchBackend(model, max_slots=count), tokenizer)
    params = [SamplingParams(max_tokens=MAX_TOKENS, temperature=0.7, top_k=50, seed=seed + 1) for seed in range(count)]
    found = engine.generate([PROMPT] * count, params)
    texts = [PROMPT + one.text for one in found]
    threads = [thread_of(text) for text in texts]
    spans = CopiedSpans([one.tokens for one in found])
    for block in read_stories(data, "train", load_manifest(data)):
        spans.add(block)
    longest = [span.longest / max(1, len(one.tokens)) for span, one in zip(spans.results(), found, strict=True)]
    known = [thread for thread in threads if thread is not None]
    return {
        "stories": count,
        "hold": sum(thread.holds for thread in known),
        "ended": sum(one.finish_reason == "stop" for one in found),
        "name": sum(thread.is_name_kept for thread in known),
        "pronouns": sum(thread.are_pronouns_kept for thread in known),
        "thing": sum(thread.is_thing_kept for thread in known),
        "cast": sum(thread.is_cast_kept for thread in known),
        "copied": round(max(longest), 3),
        "copied_mean": round(sum(longest) / count, 3),
        "texts": texts[:3],
    }
