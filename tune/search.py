"""Which points a sweep tries next: all of a grid, random ones, or those that Optuna suggests.

In: a space, and what the trials so far came to. Out: the next batch of points. It follows from the seed and from those
trials alone, in the order in which they were suggested, not in which they ended: Optuna's state is built anew from
them each time, so nothing of it has to be kept, and a sweep that goes on is suggested the same.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from ray import tune
from ray.tune.search.optuna import OptunaSearch

from slm_ray.errors import UserError
from tune.results import describe
from tune.space import Choices, Point, Range, Space, corners, grid, n_points

Search = Literal["grid", "random", "optuna"]
MAX_DRAWS = 100
"""For one new point that the config accepts."""
MAX_CORNERS = 4096
DIGITS = 4
"""Of a number drawn from a continuous range."""
METRIC = "value"


@dataclasses.dataclass(frozen=True)
class Tried:
    """A trial as the search sees it."""

    point: Point
    value: float | None  # lower is better; None of one that diverged or failed
    rung: int = 0  # the number of the last one that it reached
    is_stopped: bool = False  # early, so that its value is no final one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searcher:
    """A search over a space. Points that `refusal` gives a reason for are left out."""

    space: Space
    kind: Search
    n_trials: int  # 0 means all of the grid
    batch: int  # points that Optuna suggests at once
    seed: int
    refusal: Callable[[Point], str]

    def check(self) -> None:
        """Raises: UserError when there is nothing to try, or a value that no config accepts."""
        if self.kind == "grid":
            if self.n_trials:
                raise UserError("num_trials goes with --search random and optuna: a grid is tried as a whole")
            for point in grid(self.space):
                if why := self.refusal(point):
                    raise UserError(f"no trial with {describe(point)}: {why}")
            return
        if self.n_trials < 1:
            raise UserError(f"--search {self.kind} needs --num-trials, how many to try")
        if self.n_trials > n_points(self.space):
            raise UserError(f"num_trials ({self.n_trials}) is more than the space has points, {n_points(self.space)}")
        self._check_values()

    def _check_values(self) -> None:
        """Each choice and each end of a range must go with some values of the others."""
        if math.prod(len(domain.ends) for domain in self.space.values()) > MAX_CORNERS:
            return
        missing = {(field, value) for field, domain in self.space.items() for value in domain.ends}
        why = ""
        for point in corners(self.space):
            if missing.isdisjoint(point.items()):
                continue
            if refused := self.refusal(point):
                why = refused
            else:
                missing -= set(point.items())
        if missing:
            field, value = min(missing, key=str)
            raise UserError(f"no config accepts {field} {value}: {why}")

    def next_points(self, tried: Sequence[Tried]) -> list[Point]:
        """The next batch after these trials, the oldest first; empty at the end.

        Raises:
            UserError: no point is found that the config accepts and that was not tried yet.
        """
        if self.kind == "grid":
            return [] if tried else grid(self.space)
        wanted = self.n_trials - len(tried)
        if self.kind == "random":
            return [] if tried else self._new_points(wanted, [], self._random())
        return self._new_points(min(wanted, self.batch), [trial.point for trial in tried], self._optuna(tried))

    def _new_points(self, count: int, known: Iterable[Point], draws: Iterable[Point]) -> list[Point]:
        """So many of those drawn that are new and accepted."""
        seen = {_key(point) for point in known}
        found: list[Point] = []
        drawn = iter(draws)
        why = "all were tried before"
        while len(found) < count:
            for _ in range(MAX_DRAWS):
                point = rounded(next(drawn), self.space)
                if _key(point) in seen:
                    continue
                seen.add(_key(point))
                if not (refused := self.refusal(point)):
                    found.append(point)
                    break
                why = refused
            else:
                if found:
                    return found
                raise UserError(f"{MAX_DRAWS} points in turn of the space can be no trial ({why}): widen it")
        return found

    def _random(self) -> Iterable[Point]:
        domains = {field: ray_domain(domain) for field, domain in self.space.items()}
        rng = np.random.default_rng(self.seed)
        while True:
            yield {field: domain.sample(random_state=rng) for field, domain in domains.items()}

    def _optuna(self, tried: Sequence[Tried]) -> Iterable[Point]:
        """TPE (Bergstra et al., NeurIPS 2011); what it suggested and was not told of counts as bad to it."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = int(np.random.default_rng([self.seed, len(tried)]).integers(2**32))
        search = OptunaSearch(
            OptunaSearch.convert_search_space({field: ray_domain(domain) for field, domain in self.space.items()}),
            metric=METRIC,
            mode="min",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        worst = max((trial.value for trial in tried if trial.value is not None), default=0.0) + 1.0
        for trial in tried:
            value = worst if trial.value is None else trial.value
            at_rungs = [value] * (trial.rung + 1)  # Optuna ranks those stopped early by how far they came, then by this
            search.add_evaluated_point(dict(trial.point), value, pruned=trial.is_stopped, intermediate_values=at_rungs)
        index = 0
        while True:
            yield search.suggest(str(index))
            index += 1


def rounded(point: Mapping[str, Any], space: Space) -> Point:
    """Plain values, in the order of the space; those of continuous ranges with four digits, within their ends."""
    return {field: _rounded(point[field], domain) for field, domain in space.items()}


def _rounded(value: Any, domain: Choices | Range) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(domain, Choices) or domain.is_integer:
        return value
    return min(max(float(f"{value:.{DIGITS}g}"), domain.low), domain.high)


def ray_domain(domain: Choices | Range) -> Any:
    """The same in Ray Tune's words."""
    if isinstance(domain, Choices):
        return tune.choice(list(domain.values))
    if not domain.is_integer:
        return (tune.loguniform if domain.is_log else tune.uniform)(domain.low, domain.high)
    low, high = int(domain.low), int(domain.high)
    if domain.step:
        return tune.qrandint(low, high, domain.step)
    return (tune.lograndint if domain.is_log else tune.randint)(low, high + 1)  # whose upper end is left out


def _key(point: Point) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(point.items()))
