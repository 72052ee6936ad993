"""Stories from the Hugging Face hub, by way of the `datasets` package.

In: `hub:NAME[@REVISION][:SPLIT]`. Out: local Parquet files with one `text` column, and the revision they came from.
Called by `discovery`; after that a hub data set is a file like any other.
"""

import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slm_ray.errors import UserError
from slm_ray.hub_reference import ANSWER_TIMEOUT_S, PREFIX, HubReference, parse_hub_reference
from slm_ray.sources.addresses import all_lines
from slm_ray.sources.rows import column_hint

TEXT_COLUMN = "text"
CLIENT_START_S = 5.0
"""How long the hub's client may take until it sends the question: it is imported, and prepares its headers."""
_SCHEMA = pa.schema([pa.field(TEXT_COLUMN, pa.string())])


def parse(word: str) -> HubReference:
    """Read `hub:NAME[@REVISION][:SPLIT]`. Raises UserError where it is none."""
    found = parse_hub_reference(word)
    if found is None:
        raise UserError(f"{word} is not a data set of the hub: expected hub:OWNER/NAME[@REVISION][:SPLIT]")
    return found


def unreachable(name: str, timeout_s: float = ANSWER_TIMEOUT_S) -> str | None:
    """Why the hub is not available for this data set, in a few words; None when it answers.

    A server's own trouble (status 5xx, 429) is no answer. Takes `timeout_s` at most: it asks in a thread,
    because looking up a host name has no time limit.

    Raises:
        UserError: the hub refuses this data set (another status 4xx).
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer, is_ready = list[int | str](), threading.Event()
    asking = threading.Thread(target=lambda: answer.append(_ask(name, timeout_s, is_ready)), daemon=True)
    asking.start()
    is_ready.wait(CLIENT_START_S)
    asking.join(timeout_s)
    if not answer:
        return f"{constants.ENDPOINT} did not answer in {timeout_s:g} s"
    url, status = f"{constants.ENDPOINT}/api/datasets/{name}", answer[0]
    if isinstance(status, str):
        return f"{url}: {status}"
    why = f"{url} answered {status}"
    if status >= 500 or status == 429:
        return why
    if status >= 400:
        raise _failure(name, why, "check the name of the data set and the token (HF_TOKEN)")
    return None


@dataclass(frozen=True, kw_only=True)
class Download:
    """A data set of the hub at one revision."""

    name: str
    text_column: str
    wanted_revision: str | None = None  # branch, tag or commit; None: main
    folder: Path | None = None  # receives one Parquet file per split; None: in the cache of the hub's client
    on_bytes: Callable[[int], None] | None = None  # receives how many bytes of text came since its last call

    @functools.cached_property
    def revision(self) -> str:
        """The commit of the wanted revision. Raises UserError when the hub is not available or has none such."""
        why = unreachable(self.name)
        if why is not None:
            raise self._failed(why)
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return str(HfApi().dataset_info(self.name, revision=self.wanted_revision, timeout=30).sha)
        except RevisionNotFoundError as error:
            raise UserError(f"{PREFIX}{self.name} has no revision {self.wanted_revision!r}") from error
        except Exception as error:  # every layer below has its own family of exceptions
            raise self._failed(error) from error

    @functools.cached_property
    def splits(self) -> list[str]:
        """Names of the official splits."""
        datasets = _client()
        try:
            return list(datasets.get_dataset_split_names(self.name, revision=self.revision))
        except Exception as error:
            raise self._failed(error) from error

    def fetch(self, split: str, limit: int | None) -> Path:
        """Stream the first `limit` stories (None: all) of a split into a local Parquet file, once per revision.

        Raises:
            UserError: the hub does not answer, or has no such data set, split or column.
        """
        path = self._folder() / f"{split}-{self.text_column}-{limit or 'all'}.parquet"
        if path.exists():
            return path
        if split not in self.splits:
            raise UserError(
                f"{PREFIX}{self.name} has no split {split!r}; it has {', '.join(map(repr, self.splits))}: "
                f"name one with {PREFIX}{self.name}:SPLIT"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.part")
        try:
            self._stream(split, limit, beside)
            beside.replace(path)
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        finally:
            beside.unlink(missing_ok=True)
        return path

    def _folder(self) -> Path:
        from huggingface_hub import constants

        folder = self.folder or Path(constants.HF_HOME) / "slm-ray"
        return folder / self.name.replace("/", "--") / self.revision

    def _stream(self, split: str, limit: int | None, path: Path) -> None:
        rows: Any = _client().load_dataset(self.name, split=split, streaming=True, revision=self.revision)
        self._check_column(rows.column_names)
        rows = rows.select_columns([self.text_column])
        if limit is not None:
            rows = rows.take(limit)
        with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
            for batch in rows.iter(batch_size=1000):
                texts = pa.array(batch[self.text_column], pa.string())
                writer.write_table(pa.Table.from_arrays([texts], schema=_SCHEMA))
                if self.on_bytes is not None:
                    self.on_bytes(texts.nbytes)

    def _check_column(self, names: list[str] | None) -> None:
        if names is not None and self.text_column not in names:
            raise UserError(f"{PREFIX}{self.name} has no column {self.text_column!r}; {column_hint(names)}")

    def _failed(self, why: object) -> UserError:
        return _failure(self.name, why, "try again with a network")


def _client() -> Any:
    """The `datasets` package. Each read is repeated for 23 seconds by the hub's client below it, which is enough:
    by itself `datasets` would repeat that 20 times, and a user would wait ten minutes for the error."""
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0  # it also waits after the last time
    datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
    datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    return datasets


def _failure(name: str, why: object, remedy: str) -> UserError:
    while isinstance(why, Exception) and why.__cause__ is not None:  # the deepest one says what happened
        why = why.__cause__
    reason = all_lines(why) if isinstance(why, Exception) else why
    return UserError(
        f"cannot get {PREFIX}{name} ({reason}): use --source sample, a path to Parquet, JSONL or text, or {remedy}"
    )


def _ask(name: str, timeout_s: float, is_ready: threading.Event) -> int | str:
    """The HTTP status of the answer, or why there is none; `is_ready` is set when the question is sent."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        build_hf_headers()  # once a day it asks the hub for the names of agents, for 3 s at most
        is_ready.set()
        HfApi().dataset_info(name, timeout=timeout_s, expand=["sha"])  # nothing else: the list of files may be long
    except HfHubHTTPError as error:
        return int(error.response.status_code)
    except Exception as error:  # every layer below has its own family of exceptions
        return all_lines(error)
    return 200
