"""What a cluster on one machine is made of: addresses, ports, command lines, environments.

In: a few options. Out: the command of each part and the environment in which it runs, and the one in which a user's
commands do. Each Ray node has an address of its own in 127.0.0.0/8, ports, a folder for its files and a folder for
caches of its own, as if it were another machine: paths on this machine's disk are seen by none of the commands.
"""

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.cluster.processes import MARK, PART

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
BUCKET = "stories"
MAX_WORKERS = 9
OBJECT_STORE_BYTES = 100_000_000
"""Of each node's shared memory: what goes from process to process here is small."""
NOT_INHERITED = ("RAY_", "AWS_", "MLFLOW_")
"""Beginnings of variables that lead to other clusters and stores."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # by default a node that is ended waits 30 s for what runs on it
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ORT_DISABLE_TELEMETRY": "1",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes for what nobody here asks for
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy_limits:bound_proxy",
    "FORWARDED_ALLOW_IPS": "",
}
"""Those of Serve as serve/ray_connection.py sets them for a Ray of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """One cluster: where it lies and where its parts listen."""

    folder: Path
    """State, token and logs."""
    ray_folder: Path
    """Ray's own files: a short path, for its sockets."""
    mark: str
    """What all its processes have in their environment."""
    workers: int = 2
    cpus: int = 1
    """Of each worker node; the head has none, so that training runs elsewhere than its driver."""
    base_port: int = 26380

    @property
    def nodes(self) -> list[str]:
        """The head and the workers by name."""
        return ["head", *(f"worker-{number}" for number in range(1, self.workers + 1))]

    @property
    def names(self) -> list[str]:
        """Of all parts."""
        return ["store", "mlflow", *self.nodes]

    def address(self, node: str) -> str:
        """Of a node: 127.0.0.2 is the head's."""
        return f"127.0.0.{2 + self.nodes.index(node)}"

    def agent(self, node: str) -> str:
        """Of a node: the agent, which says whether it is well."""
        return f"http://{self.address(node)}:{self.base_port + 10 + self.nodes.index(node)}"

    def metrics(self, node: str) -> str:
        """Of a node: its figures and those of all that runs on it, for Prometheus."""
        return f"http://{self.address(node)}:{self.base_port + 20 + self.nodes.index(node)}/metrics"

    @property
    def gcs(self) -> str:
        """Where nodes and drivers join."""
        return f"{self.address('head')}:{self.base_port}"

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.address('head')}:{self.base_port + 1}"

    @property
    def mlflow(self) -> str:
        """The tracking server."""
        return f"http://{LOOPBACK}:{self.base_port + 3}"

    @property
    def store(self) -> str:
        """The object store."""
        return f"http://{LOOPBACK}:{self.base_port + 4}"

    def ports(self) -> Iterator[tuple[str, int]]:
        """All that are to be free, with their addresses; Ray takes others at random."""
        yield from ((self.address("head"), self.base_port + number) for number in range(3))
        yield from ((LOOPBACK, self.base_port + number) for number in (3, 4))
        for number, node in enumerate(self.nodes):
            yield from ((self.address(node), self.base_port + above + number) for above in (10, 20))

    def command(self, part: str) -> list[str]:
        """Of a part: `store`, `mlflow` or a node."""
        if part == "store":
            return [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(self.base_port + 4)]
        if part == "mlflow":
            kept = self.folder / "mlflow"
            return [
                sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(self.base_port + 3),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{kept / 'mlflow.db'}",
                "--artifacts-destination", str(kept / "artifacts"),
            ]  # fmt: skip
        return self._node(part)

    def _node(self, node: str) -> list[str]:
        number = self.nodes.index(node)
        options = {
            "node-ip-address": self.address(node),
            "temp-dir": self.ray_folder / node,
            "min-worker-port": 0,  # any that is free
            "max-worker-port": 0,
            "dashboard-agent-listen-port": self.base_port + 10 + number,
            "metrics-export-port": self.base_port + 20 + number,
            "object-store-memory": OBJECT_STORE_BYTES,
        }
        if node == "head":
            options |= {
                "port": self.base_port,
                "dashboard-host": self.address(node),
                "dashboard-port": self.base_port + 1,
                "ray-client-server-port": self.base_port + 2,
                "num-cpus": 0,
            }
        else:
            options |= {"address": self.gcs, "num-cpus": self.cpus}
        first = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        return [
            *first,
            *(["--head"] if node == "head" else []),
            *(f"--{key}={value}" for key, value in options.items()),
        ]

    def users_environment(self) -> dict[str, str]:
        """What a command needs to find the cluster and its stores."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_API_SERVER_ADDRESS": self.dashboard,
            "RAY_DASHBOARD_ADDRESS": self.dashboard,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "AWS_ENDPOINT_URL": self.store,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def environment(self, part: str) -> dict[str, str]:
        """In which a part runs, and of a node all jobs, workers and replicas on it."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
        bin_first = os.pathsep.join((str(Path(sys.executable).parent), own.get("PATH", os.defpath)))
        own |= SETTINGS | self.users_environment() | {"PATH": bin_first, "PYTHONPATH": str(ROOT)}
        own |= {MARK: self.mark, PART: part}
        if part == "head":  # what it knows of nodes, jobs and actors outlives it
            own |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.ray_folder / "head-gcs")}
        if part in self.nodes:
            own["XDG_CACHE_HOME"] = str(self.ray_folder / node_cache(part))
        return own

    def shell_lines(self) -> str:
        """The user's environment for `source`."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.users_environment().items()]
        return "\n".join([*lines, f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH", ""])

    def commands(self) -> list[str]:
        """The four commands against it, short ones."""
        submit, data, runs = "ray job submit", f"s3://{BUCKET}/data", f"s3://{BUCKET}/runs"
        workers = min(self.workers * self.cpus, 2)
        return [
            f"{submit} -- python pipelines/prepare.py --runner DirectRunner --source sample --max-stories 5000"
            f" --vocab-size 2048 --output {data}",
            f"{submit} -- python slm_ray/train.py --config demo --data {data} --output {runs} --workers {workers}",
            f"{submit} -- python tune/sweep.py --config demo --data {data} --output {runs} --lr 2e-3 6e-3"
            f" --trial-steps 40 --workers {workers}",
            f"{submit} --no-wait -- python serve/app.py --replicas 2",
        ]


def head_address_file(layout: Layout) -> Path:
    """In it Ray finds that a head runs at its address already, as long as workers do that know the old one."""
    return layout.ray_folder / "head" / "ray_current_cluster"


def node_cache(node: str) -> str:
    """Folder of a node's caches: what another node has there it does not see."""
    return f"{node}-cache"
