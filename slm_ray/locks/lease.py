"""A lease: the right to write to a place that several machines see and that knows no locks.

In: a folder in an object store, or on a shared disk without locks. Out: a block within which this process alone has the
right, and shows from time to time that it lives; for whoever writes in its name, on this machine or on others, `check`.
A lease whose owner has shown no life for `STALE_S` is taken over; the owner that comes back finds itself outnumbered.
The clocks of two machines are not trusted with that: before a lease is taken over, its file is watched for longer than
a living owner would leave it alone.
"""

import contextlib
import dataclasses
import datetime
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from slm_ray.errors import UserError, one_line
from slm_ray.locks.lease_files import Holder, LeaseFiles
from slm_ray.periodic import every
from slm_ray.storage import StoragePath

LEASE = ".lease"
"""Name of a lease's folder, in the place that it is for."""
HEARTBEAT_S = 20.0
STALE_S = 120.0
WATCH_S = 1.5 * HEARTBEAT_S
SETTLE_S = 5.0
"""How long a write may be under way: in a store that has no conditional write, or of a lease that is a beginning."""
LOGGER = logging.getLogger(__name__)


class LeaseLostError(UserError):
    """Another driver has the place now: this one must not write there any more."""


class Lease:
    """The right to write to one place; `pause` waits for so many seconds."""

    def __init__(self, place: StoragePath, token: str = "", pause: Callable[[float], object] = time.sleep) -> None:
        self._files = LeaseFiles(place / LEASE)
        self._place = place.as_posix()
        self._pause = pause
        number, _, self._owner = token.partition(" ")
        self._number = int(number or 0)
        self._mutex = threading.Lock()
        self._is_unheard = False
        self.lost = ""
        """How the lease was lost; empty while it is held."""

    @property
    def token(self) -> str:
        """What lets another process `check` this lease: `Lease(place, token)`; empty while it is not held."""
        return f"{self._number} {self._owner}" if self._number else ""

    @property
    def owner(self) -> str:
        """The random word of this lease."""
        return self._owner

    @contextlib.contextmanager
    def held(self, refusal: str, dead_owner: str = "") -> Iterator[None]:
        """Have the place for the length of a block. One with the owner `dead_owner` is known to be without one.

        Raises:
            UserError: another one has it (`refusal`, with who and since when), or that cannot be known now.
            LeaseLostError: at the end of the block, where the lease was lost within it.
        """
        self._take(refusal, dead_owner)
        try:
            with every(HEARTBEAT_S, self._beat, at_end=False):
                yield
            with contextlib.suppress(OSError):
                self.check()  # since this machine woke up, no sign of life may have been tried
        except Exception as error:
            with contextlib.suppress(OSError, LeaseLostError):
                self.check()
            if self.lost and not isinstance(error, LeaseLostError):  # whatever it was, it came of this
                raise LeaseLostError(self.lost) from error
            raise
        finally:
            self._give_back()

    def check(self) -> None:
        """Pass where the lease is this one's still, or where there never was one.

        Raises:
            LeaseLostError: it was lost.
            OSError: that cannot be known now.
        """
        self.raise_if_lost()
        if not self._number:
            return
        try:
            number, holder = self._files.newest()
        except OSError:
            raise
        except Exception as error:  # each store has errors of its own
            raise OSError(f"{self._place}: {one_line(error)}") from error
        if number == self._number and holder is not None and holder.owner == self._owner:
            return
        by = f"was taken over by {_who(holder)}" if holder and number > self._number else "is not held any more"
        self.lost = f"{self._place} {by}: this one has stopped writing there"
        self.raise_if_lost()

    def raise_if_lost(self) -> None:
        """Raises: LeaseLostError when the loss is known already; nobody is asked."""
        if self.lost:
            raise LeaseLostError(self.lost)

    def _take(self, refusal: str, dead_owner: str) -> None:
        try:
            number, holder = self._files.newest()
            if holder is not None and not self._is_free(number, holder, dead_owner):
                raise UserError(_refused(refusal, self._files.newest()[1] or holder))
            own = Holder(owner=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid(), since_s=time.time())
            self._create(number + 1, dataclasses.replace(own, alive_s=own.since_s), refusal)
        except UserError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UserError(
                f"cannot find out whether another process is writing to {self._place}: {one_line(error)}"
            ) from error

    def _is_free(self, number: int, holder: Holder, dead_owner: str) -> bool:
        """Whether its owner gave it back or is gone: no sign of life for long, nor while it is being watched."""
        if holder.is_released or (dead_owner and holder.owner == dead_owner):
            return True
        if abs(time.time() - holder.alive_s) <= STALE_S:
            return False
        watch_s = SETTLE_S if holder.is_begun else WATCH_S
        LOGGER.warning(
            "%s is held by one without a sign of life for long (%s): it is watched for %g s, then taken over",
            self._place, _who(holder), watch_s,
        )  # fmt: skip
        self._pause(watch_s)
        return self._files.newest() == (number, holder)

    def _create(self, number: int, own: Holder, refusal: str) -> None:
        with contextlib.suppress(FileExistsError):  # perhaps by a first try of our own whose answer was lost
            self._files.create(number, own)
        self._refuse_other(number, own, refusal)
        if not self._files.is_conditional(number, own):
            LOGGER.warning("%s has no conditional write: two drivers that start at once may both begin", self._place)
            self._pause(SETTLE_S)
            self._refuse_other(number, own, refusal)
        self._number, self._owner, self.lost = number, own.owner, ""
        self._files.remove_outnumbered(number)

    def _refuse_other(self, number: int, own: Holder, refusal: str) -> None:
        newest, holder = self._files.newest()
        if newest != number or holder is None or holder.owner != own.owner:
            raise UserError(_refused(refusal, holder or Holder()))

    def _beat(self) -> None:
        """Show that the owner lives, in a thread of its own; a store that does not answer is tried again."""
        with self._mutex:
            if not self._number or self.lost:
                return
            try:
                self.check()
                self._write(is_released=False)
            except LeaseLostError as error:
                LOGGER.warning("%s", error)
            except Exception as error:
                if not self._is_unheard:
                    LOGGER.warning("no sign of life could be left in %s: %s", self._place, one_line(error))
                self._is_unheard = True
            else:
                self._is_unheard = False

    def _give_back(self) -> None:
        """Say that the lease is free; where that cannot be said, it is free after a while."""
        with self._mutex:
            if self._number and not self.lost:
                with contextlib.suppress(Exception):
                    self.check()
                    self._write(is_released=True)
            self._number = 0

    def _write(self, *, is_released: bool) -> None:
        own = self._files.read(self._number)
        if own is not None and own.owner == self._owner:
            self._files.write(self._number, dataclasses.replace(own, alive_s=time.time(), is_released=is_released))


def _who(holder: Holder) -> str:
    since = datetime.datetime.fromtimestamp(holder.since_s).astimezone()
    return f"process {holder.pid} on {holder.host} at {since:%Y-%m-%d %H:%M:%S %Z}" if holder.owner else holder.host


def _refused(refusal: str, holder: Holder) -> str:
    how = f"one that is gone is taken over {STALE_S:g} s after its last sign of life"
    return f"{refusal} (it began as {_who(holder)}; {how})"
