"""How large a cache of keys and values, and the weights, may become, asked before they are made.

In: the shape of a model and a number of stories, or a size. Out: nothing, or one line. The context stands in
config.json alone, so that a small file could ask for any amount of memory. `backend_choice.py`, `generate.py` and the
server ask here.
"""

from slm_ray.config.schema import ModelConfig
from slm_ray.errors import UserError
from slm_ray.limits import memory_within

MAX_STORY_BYTES = 512 * 2**20
"""Of one story's cache: 4,096 tokens of 12 layers of width 768 take 300 MB."""
_HEAD_UNIT = 16  # to a multiple of which a backend may widen a head


def check_cache(
    config: ModelConfig, max_slots: int, advice: str = "lower --rows", free_on_gpu: int | None = None
) -> None:
    """Refuse a cache that is out of proportion, or larger than half of the memory that is free (with `advice`).

    free_on_gpu: bytes of the GPU that the cache is for; None for one in this machine's memory.

    Raises:
        UserError: it is.
    """
    width = -(-config.head_width // _HEAD_UNIT) * _HEAD_UNIT
    story = 2 * 4 * config.n_layers * config.kv_heads * config.seq_len * width
    shape = f"{config.n_layers} layers of {config.kv_heads} heads and {config.seq_len} tokens"
    if story > MAX_STORY_BYTES:
        raise UserError(f"the cache of a story ({shape}) would take {_mb(story)}, more than {_mb(MAX_STORY_BYTES)}")
    free = available_bytes() if free_on_gpu is None else free_on_gpu
    where = "" if free_on_gpu is None else "the GPU's "
    if free is not None and story * max_slots > free / 2:
        raise UserError(
            f"the cache of {max_slots} stories ({shape}) would take {_mb(story * max_slots)}, and {_mb(free)} "
            f"of {where}memory are free, of which it may take half: {advice}"
        )


def check_weights(n_bytes: int) -> None:
    """Refuse weights that do not fit into memory: while they are loaded they are there twice.

    Raises:
        UserError: they do not.
    """
    free = available_bytes()
    if free is not None and 2 * n_bytes > free:
        raise UserError(f"its weights are {_mb(n_bytes)}, loading takes twice that, and {_mb(free)} are free")


def available_bytes() -> int | None:
    """Memory that is free for this process, as Linux and a container's control groups say; None where neither does."""
    seen = memory_within()
    return seen[1] if seen else None


def _mb(size: float) -> str:
    return f"{size / 2**20:,.0f} MB"
