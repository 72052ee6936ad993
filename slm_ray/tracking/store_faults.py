"""What an error of MLflow's client means: a server that does not answer now, or one that refuses.

In: an error. Out: a `UserError` in one line. What is away may come back: work goes on, and is told later. A refusal (a
wrong password, an address without MLflow behind it) would come again: it ends the command.
"""

from slm_ray.errors import UserError, one_line

_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")
"""MLflow's words for no answer, and for the answers 429 and 5xx; a refusal (401, 403, 404) has others."""


class StoreAwayError(UserError):
    """A server does not answer now: what it has cannot be said, and it may answer later."""


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow's client raises where its store is gone, or is none."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, OSError, SQLAlchemyError


def store_fault(uri: str, error: Exception, *, is_server: bool) -> UserError:
    """The error to raise for one of `store_errors`; a store on this machine is never away."""
    is_away = is_server and getattr(error, "error_code", "") in ("", *_AWAY)
    kind = StoreAwayError if is_away else UserError
    return kind(f"the MLflow store {uri} cannot be used: {one_line(error)}")
