"""stub until merged with s7-eval"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    mean: float
    standard_error: float
    low: float
    high: float
    n_stories: int
