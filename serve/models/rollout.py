"""Which version of the model is served, and how another takes its place.

In: a reference, as `models:/tinystories@champion`, that may point to another version at any time. Out: the current
loaded model, which receives the requests. A new version is loaded beside the old one, has to answer the fixed prompts,
and then takes all new requests; the old one finishes what it has. One that fails leaves the old one serving.
"""

import asyncio
import dataclasses
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeAlias

import torch

from serve.models.description import (
    ModelDescription,
    RolloutStatus,
    for_strangers,
    reason_for_strangers,
    without_secrets,
)
from serve.models.loaded_model import LoadedModel
from slm_ray.config.devices import DeviceName
from slm_ray.errors import UserError, one_line
from slm_ray.generation.backend_choice import BackendName
from slm_ray.generation.engine_thread import EngineBusyError, EngineClosedError, EngineError, Order
from slm_ray.generation.request import Completion
from slm_ray.generation.sampling import SamplingParams
from slm_ray.limits import core_count
from slm_ray.tracking.registry import REGISTERED, RegistryError, locate, resolved_model

LOGGER = logging.getLogger(__name__)
LONGEST_WAIT_S = 60.0
"""Between two looks at a store that does not answer."""
MAX_RETIRING = 2
"""Versions that may be finishing their stories, beside the one that is served."""
MANY_FAILURES = 3
"""Failed stories in a row after which the model is asked whether it can write at all."""
PROBE_S = 10.0
OrdersFor: TypeAlias = Callable[[LoadedModel], Sequence[Order]]
"""Makes what is asked for, for the model that takes it: models have templates of their own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AliasWatch:
    """What to look at, and what to do when it changes."""

    source: str = "the registry"
    """What is looked at, in words for anybody."""
    locate: Callable[[], str]
    """Returns what the reference points to now (`registry.locate`)."""
    load: Callable[[], LoadedModel]
    """Loads it."""
    interval_s: float = 5.0
    """Time between two looks."""
    drain_s: float = 300.0
    """Longest time that the old version has to finish its requests."""


class Rollout:
    """The current model: what the routes ask. With a watch, a thread of its own changes it."""

    def __init__(self, current: LoadedModel, watch: AliasWatch | None = None) -> None:
        self.current = current
        self._attempt = RolloutStatus()
        self._trouble = ""
        self._rejected = ""  # what was located and failed: not tried again
        self._retiring: list[LoadedModel] = []  # those that finish what they have, oldest first
        self._retired = threading.Condition()
        self._is_broken = False
        self._stopping = threading.Event()
        if watch is not None:
            # A daemon: a store that hangs must not keep the process from ending.
            threading.Thread(target=self._follow, args=[watch], name="rollout", daemon=True).start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken, and can be answered."""
        return not (self._stopping.is_set() or self._is_broken)

    @property
    def status(self) -> RolloutStatus:
        """How the last attempt to change the version went, and whether the reference can be followed at all."""
        detail = "; ".join(filter(None, (self._attempt.detail, self._trouble)))
        return RolloutStatus(state=self._attempt.state, detail=detail)

    @property
    def description(self) -> ModelDescription:
        """The current model and the status."""
        return self.current.description.model_copy(update={"rollout": self.status})

    def submit_all(self, orders: OrdersFor) -> "tuple[LoadedModel, list[Future[Completion]]]":
        """Ask the current model for continuations, all or none; returns that model too.

        Raises:
            PromptError, EngineBusyError, EngineClosedError: as `EngineThread.submit_all`.
        """
        while not self._stopping.is_set():
            model = self.current
            try:
                return model, model.submit_all(orders(model))
            except EngineClosedError:
                if model is self.current:
                    raise
        raise EngineClosedError("the server is stopping")

    def submit(self, prompt: str | Sequence[int], params: SamplingParams) -> "tuple[LoadedModel, Future[Completion]]":
        """Ask for one continuation. Raises: as `submit_all`."""
        model, (future,) = self.submit_all(lambda _: [Order(prompt, params)])
        return model, future

    async def check(self) -> None:
        """Where several stories in a row have failed, ask for a token of one.

        Raises:
            EngineError: that fails too.
        """
        self._is_broken = self._is_broken and self.current.failures > 0
        if self.current.failures < MANY_FAILURES:
            return
        try:
            future = self.current.submit("", SamplingParams(max_tokens=1))
            await asyncio.wait_for(asyncio.wrap_future(future), PROBE_S)
        except (EngineBusyError, EngineClosedError, TimeoutError):  # others are being written, or it is being replaced
            return
        except EngineError:
            self._is_broken = True
            raise
        self._is_broken = False

    async def close(self, drain_s: float = 0) -> None:
        """Take no more requests, let those that run or wait finish for so long, fail the rest."""
        self._stopping.set()
        models = [self.current, *self._retiring]
        await asyncio.gather(*(asyncio.to_thread(model.close, drain_s) for model in models))

    def _follow(self, watch: AliasWatch) -> None:
        wait_s = watch.interval_s
        while not self._stopping.wait(wait_s):
            is_known = self._check_alias(watch)
            wait_s = watch.interval_s if is_known else max(watch.interval_s, min(2 * wait_s, LONGEST_WAIT_S))

    def _check_alias(self, watch: AliasWatch) -> bool:
        """Look at the reference once, and change the version if it has changed. Returns whether it could be read."""
        try:
            target = watch.locate()
        except BaseException as error:  # whatever goes wrong in a store, the version at hand goes on
            self._note_trouble(error, watch)
            return False
        if target == self.current.identity:
            if self._rejected:
                self._rejected, self._attempt = "", RolloutStatus(detail=f"back to {self.current.title}")
        elif target != self._rejected:
            return self._change(watch, target)
        self._trouble = ""
        return True

    def _note_trouble(self, error: BaseException, watch: AliasWatch) -> None:
        """For anybody in our words; what the store said, with its address, goes to the log."""
        trouble = f"{watch.source} does not answer: {self.current.title} goes on"
        if trouble != self._trouble:
            LOGGER.warning("%s: %s", trouble, without_secrets(one_line(error)))
        self._trouble = trouble

    def _change(self, watch: AliasWatch, target: str) -> bool:
        """Returns false when the store went away in between, so that it is tried again."""
        before = self._attempt
        self._attempt = RolloutStatus(state="loading", detail=for_strangers(f"{target} beside {self.current.title}"))
        try:
            model = watch.load()
        except RegistryError as error:
            self._attempt = before
            self._note_trouble(error, watch)
            return False
        except BaseException as error:  # a version may fail in any way, also by a panic of Rust's
            self._reject(target, error)
        else:
            self._trouble = ""  # before the new version is seen to serve
            self._switch(model, watch.drain_s)
        self._trouble = ""
        return True

    def _reject(self, target: str, error: BaseException) -> None:
        self._rejected = target
        whole = one_line(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        LOGGER.warning("%s is not served: %s; %s goes on", target, without_secrets(whole), self.current.title)
        detail = f"{for_strangers(target)} is not served: {reason_for_strangers(error)}; {self.current.title} goes on"
        self._attempt = RolloutStatus(state="failed", detail=detail)

    def _switch(self, model: LoadedModel, drain_s: float) -> None:
        """The old version finishes what it has in a thread of its own: the reference is looked at meanwhile."""
        with self._retired:  # no more than three in memory
            self._retired.wait_for(lambda: len(self._retiring) < MAX_RETIRING or self._stopping.is_set())
        old, self._rejected = self.current, ""
        self._retiring = [*self._retiring, old]
        self.current, self._is_broken = model, False
        if self._stopping.is_set():  # `close` may have come before: then it knew the old one only
            model.close()
        detail = comparison(old, model)
        LOGGER.info("%s", detail)
        self._attempt = RolloutStatus(detail=detail)
        threading.Thread(target=self._retire, args=[old, drain_s], name="retiring", daemon=True).start()

    def _retire(self, model: LoadedModel, drain_s: float) -> None:
        model.close(drain_s)
        with self._retired:
            self._retiring = [one for one in self._retiring if one is not model]
            self._retired.notify_all()


def comparison(old: LoadedModel, new: LoadedModel) -> str:
    """Logs what both versions wrote after the fixed prompts; returns a sentence that sums it up."""
    written = {answer.prompt: answer for answer in old.answers}
    for answer in new.answers:
        before = written.get(answer.prompt)
        LOGGER.info(
            "after %r %s wrote %r in %.3f s, %s wrote %r in %.3f s", answer.prompt,
            old.title, before and before.text, before.seconds if before else 0, new.title, answer.text, answer.seconds,
        )  # fmt: skip
    alike = sum(answer.prompt in written and written[answer.prompt].text == answer.text for answer in new.answers)
    return (
        f"{new.title} took over from {old.title}: it answered {len(new.answers)} prompts in {new.answer_s:.3f} s "
        f"({old.answer_s:.3f} s before), {alike} of them with the same words"
    )


def start_rollout(
    reference: str,
    tracking_uri: str,
    replicas: int,
    *,
    max_slots: int = 8,
    max_waiting: int = 64,
    backend: BackendName = "auto",
    device: DeviceName = "cpu",
    watch_interval_s: float = 5.0,
    drain_s: float = 300.0,
) -> Rollout:
    """Load a model in a process that shares its machine with the HTTP proxy and the other replicas, and watch it.

    Raises:
        UserError: there is no such model, or it is corrupt.
    """
    # The proxy's work is small beside this. More than four threads only wait for each other on models of this size.
    threads = max(1, min(4, core_count() // replicas))
    torch.set_num_threads(threads)

    def load() -> LoadedModel:
        # a copy that had to be made is gone once it is read: who ends this process does not ask it to tidy up
        with resolved_model(reference, tracking_uri) as source:
            return LoadedModel(source, max_slots, max_waiting, backend, threads, device)

    watch = AliasWatch(
        source="the registry" if reference.startswith(REGISTERED) else "the folder of the model",
        locate=lambda: locate(reference, tracking_uri),
        load=load,
        interval_s=watch_interval_s,
        drain_s=drain_s,
    )
    return Rollout(load(), watch)
