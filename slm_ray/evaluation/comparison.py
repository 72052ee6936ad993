"""How sure a loss is, and whether one model is better than another: standard errors clustered by story.

In: `StoryLosses` of one model, or of two on the same stories. Out: a standard error; a `PairedDifference`. The tokens
of a story are not independent of each other, stories are: so a story is one observation. Nats over bytes is a ratio of
two sums over stories, whose variance is that of its linearisation (the delta method; Cochran, Sampling Techniques,
chapter 6; for evaluations of language models, Miller, arXiv:2411.00640).
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from slm_ray.errors import UserError
from slm_ray.evaluation.losses import StoryLosses

_NORMAL_97_5 = 1.959963984540054
_T_OF_FEW = {1: 12.706204736432095, 2: 4.302652729696142}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """By how many bits per byte one model is above another on the same stories; below 0 it is the better one."""

    mean: float
    """Bits per byte of the first less that of the second, over all stories."""
    standard_error: float
    """Infinite with a single story."""
    low: float
    """Lower end of the 95 % interval (Student's t)."""
    high: float
    """Upper end; below 0 the first model is better beyond doubt."""
    n_stories: int


def compare(first: StoryLosses, second: StoryLosses) -> PairedDifference:
    """Bits per byte of the first less that of the second, paired by story; their tokenizers may differ.

    Raises:
        UserError: they are not of the same stories, by their ids and bytes.
    """
    order = {story_id: number for number, story_id in enumerate(second.story_ids)}
    if len(order) != len(second.story_ids):
        raise UserError("two stories have one id: the losses cannot be paired by story")
    missing = [story_id for story_id in first.story_ids if story_id not in order]
    if missing or len(order) != len(first.story_ids):
        one = f", as {missing[0]}" if missing else ""
        raise UserError(f"two models can be compared on the same stories alone, and these are others{one}")
    place = np.array([order[story_id] for story_id in first.story_ids])
    other = np.flatnonzero(first.n_bytes != second.n_bytes[place])
    if len(other):
        raise UserError(f"the text of {first.story_ids[other[0]]} is another for each of the two models")
    bits = (first.nats - second.nats[place]) / math.log(2)
    mean = math.fsum(bits) / int(first.n_bytes.sum())
    error = ratio_standard_error(bits, first.n_bytes)
    reach = math.inf if math.isinf(error) else t_quantile(len(bits) - 1) * error
    return PairedDifference(mean=mean, standard_error=error, low=mean - reach, high=mean + reach, n_stories=len(bits))


def bits_per_byte_error(losses: StoryLosses) -> float:
    """Standard error of bits per byte, clustered by story."""
    return ratio_standard_error(losses.nats / math.log(2), losses.n_bytes)


def loss_error(losses: StoryLosses) -> float:
    """Standard error of the loss a token, clustered by story."""
    return ratio_standard_error(losses.nats, losses.n_tokens)


def ratio_standard_error(above: npt.NDArray[np.float64], below: npt.NDArray[np.int64]) -> float:
    """Standard error of sum(above) / sum(below) over n clusters; infinite for one.

    With the ratio R, its variance is n / (n - 1) times the sum of (above - R below)^2, over sum(below)^2.
    """
    n = len(above)
    if n < 2:
        return math.inf
    whole = int(below.sum())
    rest = above - (math.fsum(above) / whole) * below
    return math.sqrt(n / (n - 1) * math.fsum(rest * rest)) / whole


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom, at least 1.

    Abramowitz and Stegun, 26.7.5, which is within 0.2 % from 3 degrees of freedom on.
    """
    if freedom in _T_OF_FEW:
        return _T_OF_FEW[freedom]
    z = _NORMAL_97_5
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum((z, *(term / freedom**power for power, term in enumerate(terms, start=1))))
