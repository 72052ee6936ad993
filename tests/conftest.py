"""What tests share: a tiny data set, a tiny model, and one local Ray for the tests that need it."""

import logging
import os

os.environ["RAY_ADDRESS"] = "local"  # never join a cluster that happens to run on this machine
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # by default two seconds, in which a run of ours is over
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  by default 15: tests beside would take both cores from Ray
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the compiler's own processes import torch for longer than they work
os.environ.pop("MLFLOW_TRACKING_URI", None)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from slm_ray.cli.script import set_default_environment
from slm_ray.config.schema import ModelConfig, OptimConfig, TrainConfig
from slm_ray.corpus.grammar import sample_stories
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.tokenization.training import train_bpe
from tests.support.data_sets import write_data
from tests.support.ray_files import starts_ray

hypothesis.settings.register_profile("steady", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("steady")
set_default_environment()
TINY_STORIES = 120


class ByFile(LoadScopeScheduling):
    """For `-n 2`: a file's tests stay in one process, those with Ray all in the same, one after another."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0]
        return "ray" if starts_ray(self.config.rootpath / name) else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    """xdist's own `--dist loadgroup` (3.8) does nothing under pytest 9.2: it writes an attribute nobody reads."""
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those with Ray, which take the longest, begin."""
    items.sort(key=lambda item: not starts_ray(item.path))  # stable


_begun_with_ray: list[bool] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """With `-n 2` the tests without Ray let those with it go first: one after another, these take minutes longer."""
    if "PYTEST_XDIST_WORKER" in os.environ and not _begun_with_ray:
        _begun_with_ray.append(starts_ray(item.path))
        if not _begun_with_ray[0]:
            os.nice(5)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Iterator[None]:
    """What was left out for want of a browser is said in the last lines."""
    yield
    skipped = [one for one in terminalreporter.stats.get("skipped", ()) if "no browser" in str(one.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} tests of the page did not run: no browser (apt-get install chromium)"
        )


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Several threads on tiny tensors wait for each other, on a busy machine for seconds; a test may set more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """512 entries, trained on the sample corpus."""
    return train_bpe(sample_stories(0, TINY_STORIES), vocab_size=512)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A data-set folder of 120 sample stories in two training shards and a validation shard, made without Beam."""
    folder = tmp_path_factory.mktemp("tiny-data")
    write_data(folder, tiny_tokenizer, {"train": [(0, 60), (60, 110)], "validation": [(110, 120)]})
    return folder


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> TrainConfig:
    """A run of 8 steps with a 2-layer model of width 32, with a store of its own."""
    return TrainConfig(
        data=str(tiny_data),
        output=str(tmp_path / "runs"),
        name="tiny",
        workers=1,
        threads=1,
        batch_size=8,
        max_steps=8,
        eval_interval_steps=4,
        log_interval_steps=2,
        precision="fp32",
        compile="off",
        max_failures=0,
        tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
        model=ModelConfig(seq_len=32, n_layers=2, d_model=32, n_heads=4, d_ff=64),
        optim=OptimConfig(warmup_steps=2),
    )


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow store for the tests of single functions: making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[Any]:
    """A Ray of this test module's own, of two CPUs, gone when the module is done."""
    import ray

    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def s3() -> Iterator[Callable[..., Any]]:
    """A real object-store server on loopback, known to the client by its environment as a user's would be."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "mouse")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "cheese")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="stories")
        yield lambda key, content: client.put_object(Bucket="stories", Key=key, Body=content)
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
