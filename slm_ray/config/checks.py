"""What a config refuses when it is made.

In: a claim and what to say where it does not hold. Out: nothing, or a ValueError. `schema` and `shape` ask here.
"""

import math


def require(is_valid: bool, message: str) -> None:
    """Refuse what is not valid. Raises: ValueError with the message."""
    if not is_valid:
        raise ValueError(message)


def require_positive(name: str, value: float) -> None:
    """Refuse a number that is not above 0 and finite. Raises: ValueError, which names the field."""
    require(0 < value < math.inf, f"{name} ({value}) must be above 0 and finite")
