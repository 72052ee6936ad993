"""Stories from the Hugging Face hub, by way of the `datasets` package.

In: the name of a data set. Out: local Parquet files with one `text` column, and the revision they came from.
Called by `sources`; beyond it a hub data set is a file like any other.
"""

import functools
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slm_ray.errors import UserError

ANSWER_TIMEOUT_S = 4.0
TEXT_COLUMN = "text"
_SCHEMA = pa.schema([pa.field(TEXT_COLUMN, pa.string())])


def unreachable(name: str, timeout_s: float = ANSWER_TIMEOUT_S) -> str | None:
    """Why the hub cannot be asked for this data set now, in a few words; None when it answers.

    A server's own trouble (status 5xx, 429) is no answer. Takes `timeout_s` at most: it asks in a thread,
    because looking up a host name knows no time limit.

    Raises:
        UserError: the hub answers that it does not give this data set (another status 4xx).
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[int | str] = []
    url = f"{constants.ENDPOINT}/api/datasets/{name}"
    asking = threading.Thread(target=lambda: answer.append(_ask(url, get_token(), timeout_s)), daemon=True)
    asking.start()
    asking.join(timeout_s)
    status = answer[0] if answer else f"{constants.ENDPOINT} did not answer in {timeout_s:g} s"
    if isinstance(status, str):
        return status
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
    folder: Path | None = None  # receives one Parquet file per split; None: in the cache of the hub's client

    @functools.cached_property
    def revision(self) -> str:
        """The commit that `main` points to now. Raises UserError when the hub cannot be asked."""
        why = unreachable(self.name)
        if why is not None:
            raise self._failed(why)
        try:
            from huggingface_hub import HfApi

            return str(HfApi().dataset_info(self.name, timeout=30).sha)
        except Exception as error:  # every layer below has its own family of exceptions
            raise self._failed(error) from error

    @functools.cached_property
    def splits(self) -> list[str]:
        """Names of the official splits."""
        import datasets

        try:
            return list(datasets.get_dataset_split_names(self.name, revision=self.revision))
        except Exception as error:
            raise self._failed(error) from error

    def fetch(self, split: str, limit: int | None) -> Path:
        """Stream the first `limit` stories (None: all) of a split into a local Parquet file.

        Raises:
            UserError: the hub does not answer, or has no such data set, split or column.
        """
        path = self._folder() / f"{split}-{self.text_column}-{limit or 'all'}.parquet"
        if path.exists():
            return path
        beside = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stream(split, limit, beside)
        except Exception as error:
            raise self._failed(error) from error
        beside.replace(path)
        return path

    def _folder(self) -> Path:
        from huggingface_hub import constants

        folder = self.folder or Path(constants.HF_HOME) / "slm-ray"
        return folder / self.name.replace("/", "--") / self.revision

    def _stream(self, split: str, limit: int | None, path: Path) -> None:
        import datasets

        rows: Any = datasets.load_dataset(self.name, split=split, streaming=True, revision=self.revision)
        rows = rows.select_columns([self.text_column])
        if limit is not None:
            rows = rows.take(limit)
        with pq.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
            for batch in rows.iter(batch_size=1000):
                texts = pa.array(batch[self.text_column], pa.string())
                writer.write_table(pa.Table.from_arrays([texts], schema=_SCHEMA))

    def _failed(self, why: object) -> UserError:
        return _failure(self.name, why, "try again with a network")


def _failure(name: str, why: object, remedy: str) -> UserError:
    reason = " ".join(str(why).split())[:200] or type(why).__name__
    return UserError(
        f"cannot get hub:{name} ({reason}): use --source sample, a path to Parquet, JSONL or text, or {remedy}"
    )


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer; following it might carry the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _ask(url: str, token: str | None, timeout_s: float) -> int | str:
    """The HTTP status of the answer, or why there is none."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        request = urllib.request.Request(url, method="HEAD", headers=headers)  # noqa: S310
        with urllib.request.build_opener(_StayHere).open(request, timeout=timeout_s) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError) as error:
        return f"{url}: {getattr(error, 'reason', error)}"
