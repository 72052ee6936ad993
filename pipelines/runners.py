"""Where the pipeline runs, and how what goes wrong there reaches the user as one line.

In: Beam's options. Out: a `beam.Pipeline`. The rest of `pipelines/` does not know which runner it is.
"""

import atexit
import functools
import importlib
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apache_beam as beam
import grpc  # type: ignore[import-untyped, unused-ignore]
from apache_beam.options.pipeline_options import (
    DirectOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    StandardOptions,
)
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner

from pipelines import runner_names
from slm_ray import internals, storage
from slm_ray.errors import UserError
from slm_ray.limits import core_count
from slm_ray.malloc import ARENA_MAX, MMAP_THRESHOLD, TOP_PAD, TRIM_THRESHOLD, set_malloc
from slm_ray.sources.addresses import all_lines
from slm_ray.storage import StoragePath
from slm_ray.tokenization.tokenizer import Tokenizer, cached_tokenizer

forked_workers: types.ModuleType | None
try:
    from pipelines import forked_workers
except (ImportError, AttributeError):  # a version of Beam with other names inside: workers are started as it does it
    forked_workers = None

LOGGER = logging.getLogger(__name__)
MALLOC = {TRIM_THRESHOLD: 1 << 27, TOP_PAD: 1 << 24, MMAP_THRESHOLD: 1 << 25, ARENA_MAX: 1}
"""What keeps the arrays of a range and lets go of more."""
ANSWER_TIMEOUT_S = 5.0
_SERVER_MODULES = (
    "apache_beam.runners.portability.fn_api_runner.worker_handlers",
    "apache_beam.runners.portability.local_job_service",
)
WORKER_LOG = "SLM_RAY_WORKER_LOG"
"""The variable in which worker processes find the file that they log into."""
_STEP_NAME = re.compile(r" \[while running .*", flags=re.S)


def is_direct(beam_options: PipelineOptions) -> bool:
    """Whether the pipeline runs on this machine, by the FnApiRunner."""
    return runner_names.is_direct(beam_options.view_as(StandardOptions).runner)


def prepare_workers(beam_options: PipelineOptions, tokenizer: Tokenizer | None = None) -> None:
    """Make worker processes, if the job will have some; best called early, see `forked_workers`. They make ready the
    tokenizer, where it is given."""
    keep_freed_memory()  # a fork does as this process
    direct = beam_options.view_as(DirectOptions)
    if is_direct(beam_options) and direct.direct_running_mode == "multi_processing":
        if direct.direct_num_workers < 0:
            raise UserError(f"direct_num_workers ({direct.direct_num_workers}) must be 0, for all cores, or more")
        direct.direct_num_workers = direct.direct_num_workers or core_count()  # Beam would count the machine's
        if forked_workers is not None:
            tokenizer_json = "" if tokenizer is None else tokenizer.to_json()
            forked_workers.prepare_forks(direct.direct_num_workers, functools.partial(_make_ready, tokenizer_json))


def _make_ready(tokenizer_json: str) -> None:
    """In a worker, what its first text would wait for: most of a second, if it is the first use of a tokenizer."""
    importlib.import_module("awkward")
    importlib.import_module("gigatoken")
    if tokenizer_json:
        cached_tokenizer(tokenizer_json).encode_batch(["Once upon a time"])


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: each range takes hundreds of arrays of megabytes, and to get them from the system
    anew each time is a tenth of the work. Another libc does what it does."""
    set_malloc(MALLOC)


def refuse_private_memory(beam_options: PipelineOptions, folder: StoragePath) -> None:
    """Refuse worker processes that would write into a memory of their own.

    Raises:
        UserError: the folder is at `memory://`, which no other process sees.
    """
    in_process = (
        is_direct(beam_options) and beam_options.view_as(DirectOptions).direct_running_mode != "multi_processing"
    )
    if str(folder).startswith("memory://") and not in_process:
        raise UserError(f"{folder} is the memory of one process, and workers are others: choose another --output")


def make_pipeline(beam_options: PipelineOptions, staged: StoragePath) -> beam.Pipeline:
    """A pipeline on the runner asked for; worker processes of this machine log into the staging folder, if it is local.

    Beam's own `DirectRunner` tries to download the Prism binary and runs elsewhere when it cannot: which code
    runs then depends on the network. Here the word means Beam's in-process FnApiRunner, always.
    """
    runner = beam_options.view_as(StandardOptions).runner
    if is_direct(beam_options):
        log = str(staged / "workers.log") if storage.is_local(staged) else os.devnull
        runner = _direct_runner(beam_options.view_as(DirectOptions), log)
    elif _has_service(beam_options):
        _refuse_absent(beam_options.view_as(PortableOptions).job_endpoint)
    try:
        pipeline = beam.Pipeline(runner=runner, options=beam_options)
        # for steps in other languages, of which there are none here; Beam removes it at the end of a run alone
        shutil.rmtree(pipeline.local_tempdir, ignore_errors=True)
        if is_direct(beam_options):  # else a deep copy is sent
            # Beam asks for a view 450 times while a graph is built, and reads the command line anew for each
            object.__setattr__(pipeline.options, "view_as", functools.cache(pipeline.options.view_as))
        return pipeline
    except (ValueError, ImportError) as error:  # no such runner, or what it needs is not installed
        raise UserError(f"cannot use the runner {runner}: {error}") from error


@contextmanager
def own_temporary_folder(beam_options: PipelineOptions) -> Iterator[Callable[[], None]]:
    """Where another runner is asked for, let Beam put what it sends there into a folder for the length of the block.

    It makes several beside each other in the folder for temporary files, and leaves them. Yields what removes the
    folder at once, for an end of the process within the block. The folder of a job server that Beam began stays to the
    end of the process: there the server is ended, but only after its own folder was found and removed.
    """
    if is_direct(beam_options):
        yield lambda: None
        return
    setup = beam_options.view_as(SetupOptions)
    if setup.requirements_file and not setup.requirements_cache:  # packages that it downloaded: those are to stay
        setup.requirements_cache = str(Path(tempfile.gettempdir()) / "beam-requirements-cache")
    importlib.import_module("matplotlib")  # without a home it has a folder there for as long as this process lives
    folder = tempfile.mkdtemp(prefix="slm-prepare-")
    remove = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(remove)  # behind all that Beam registers within the block
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield remove
    finally:
        tempfile.tempdir = before
        if _has_service(beam_options):
            remove()


def _has_service(beam_options: PipelineOptions) -> bool:
    """Whether jobs go to a job service that somebody else has begun."""
    return str(beam_options.view_as(StandardOptions).runner).lower() == "portablerunner"


def _refuse_absent(endpoint: str | None) -> None:
    """Refuse an address where no job service answers: Beam would wait there silently."""
    how = "start one with `python -m apache_beam.runners.portability.local_job_service_main -p 8099`"
    if not endpoint:
        raise UserError(f"PortableRunner needs --job_endpoint HOST:PORT of a job service: {how}")
    if endpoint == "embed":
        return
    with grpc.insecure_channel(endpoint) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise UserError(f"no job service answers at --job_endpoint {endpoint}: {how}") from error


@contextmanager
def user_errors(output: StoragePath) -> Iterator[None]:
    """A user's mistake found on a worker, or a Ctrl-C, comes back with Beam's words around it: unwrap it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {output}: {_STEP_NAME.sub('', str(error))}") from error
    except UserError as error:
        raise UserError(_STEP_NAME.sub("", str(error))) from error
    except RuntimeError as error:  # from another process: the traceback as text
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        if "Channel closed prematurely" in str(error) or "terminated with exit code" in str(error):
            raise UserError(
                "a worker process ended before its work was done (killed, or out of memory?): "
                "run the same command again, it goes on with the ranges that are left"
            ) from error
        if re.search("Unable to (fetch remote|install)", str(error)):
            raise UserError(
                f"the runner needs a program that is not here and could not be fetched ({all_lines(error)}): "
                "see infra/README.md for what each runner needs"
            ) from error
        if "CalledProcessError: Command '['docker', 'run'" in str(error):
            raise UserError(
                "the runner could not start its container by `docker run`: start Docker, or take workers without it, "
                "--environment_type LOOPBACK (see infra/README.md)"
            ) from error
        if message := re.search(r"UserError: (.+)", str(error)):
            raise UserError(_STEP_NAME.sub("", message[1])) from error
        if message := re.search(r"(?:OS|Permission)Error: (.+)", str(error)):
            raise UserError(f"cannot write to {output}: {_STEP_NAME.sub('', message[1])}") from error
        raise


def keep_to_loopback() -> None:
    """Let Beam's servers for its worker processes listen on this machine alone: they ask nobody who he is.

    Beam 2.77 binds them to all interfaces and has no option for it, though its workers call `localhost`.
    """
    for name in _SERVER_MODULES:
        if internals.find(f"{name}:grpc") is None:
            LOGGER.warning("servers of Beam %s for its workers may listen on every interface", beam.__version__)
            continue
        module = importlib.import_module(name)
        module.grpc = types.SimpleNamespace(**{**vars(grpc), "server": _loopback_server})  # type: ignore[attr-defined]


def _loopback_server(*args: Any, **settings: Any) -> grpc.Server:
    server = grpc.server(*args, **settings)
    bind = server.add_insecure_port
    server.add_insecure_port = lambda address: bind(address.replace("[::]", "localhost"))
    return server


def _direct_runner(direct: DirectOptions, worker_log: str) -> FnApiRunner:
    """FnApiRunner, whose worker processes log into a file: on the terminal they announce each start and stop."""
    if direct.direct_running_mode != "multi_processing":
        return FnApiRunner()
    keep_to_loopback()
    if forked_workers is None:
        return FnApiRunner()
    direct.direct_running_mode = "in_memory"  # the other word would put Beam's own command in place of this one
    # Ctrl-C reaches all processes of a terminal: only this one is to act on it, the others end with it.
    command = f"trap '' INT; exec {shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
    # Not in the command, which Beam takes for UTF-8, as the name of a folder need not be.
    os.environ[WORKER_LOG] = worker_log
    logged = f'{command} 2>> "${WORKER_LOG}"'
    forked_workers.ForkedWorkerHandler.log = worker_log
    return FnApiRunner(forked_workers.ForkedEnvironment.from_command_string(logged))
