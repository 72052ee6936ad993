"""Names of other packages that are not theirs to promise: where a version lacks one, something stands in for it.

In: a name of `NAMES`. Out: the object, or what stands in for it, said in a line at DEBUG level. A test looks up all of
them by name, and another that no other private name is used: so an upgrade says at once what changed.
"""

import importlib
import logging
import operator
from collections.abc import Mapping
from typing import Any

LOGGER = logging.getLogger(__name__)
_OPTIONS = "apache_beam.options.pipeline_options"
_HANDLERS = "apache_beam.runners.portability.fn_api_runner.worker_handlers"
_JOB_SERVICE = "apache_beam.runners.portability.local_job_service"
_ENVIRONMENTS = "apache_beam.transforms.environments"
_MONITORS = "mlflow.system_metrics.metrics"

_UNCHECKED = "only Beam looks at its options, and no typo is refused"
_OPEN = "a warning that Beam's servers may listen on every interface"
_BEAMS_WAY = "worker processes are started as Beam does it"
NAMES: Mapping[str, str] = {
    "torch:_foreach_mul_": "Muon steps one matrix after another",
    "torch:_foreach_add_": "Muon steps one matrix after another",
    "torch.cpu:_is_avx512_supported": "the CPU counts as one without AVX-512: short trainings are not compiled",
    "torch.cpu:_is_avx512_bf16_supported": "precision auto is fp32",
    "torch.cpu:_is_amx_tile_supported": "precision auto is fp32 unless AVX-512 has bf16",
    "ray.train.torch:TorchTrainer._create_default_callbacks": "two of Ray's helper processes are started for nothing",
    "ray.serve.context:_get_global_client": "the message on another Ray Serve does not say where it listens",
    "ray.serve._private.replica:add_port_to_grpc_server": "no server starts: replicas would listen on every interface",
    f"{_OPTIONS}:_BeamArgumentParser": _UNCHECKED,
    f"{_OPTIONS}:PipelineOptions._add_argparse_args": _UNCHECKED,
    f"{_HANDLERS}:grpc": _OPEN,
    f"{_JOB_SERVICE}:grpc": _OPEN,
    f"{_HANDLERS}:SubprocessSdkWorkerHandler.control_api_service_descriptor": _BEAMS_WAY,
    f"{_HANDLERS}:SubprocessSdkWorkerHandler.logging_api_service_descriptor": _BEAMS_WAY,
    f"{_HANDLERS}:SubprocessSdkWorkerHandler.start_worker": _BEAMS_WAY,
    f"{_HANDLERS}:SubprocessSdkWorkerHandler.stop_worker": _BEAMS_WAY,
    f"{_HANDLERS}:WorkerHandler.register_environment": _BEAMS_WAY,
    f"{_ENVIRONMENTS}:Environment.register_urn": _BEAMS_WAY,
    f"{_ENVIRONMENTS}:SubprocessSDKEnvironment.from_command_string": _BEAMS_WAY,
    "apache_beam.runners.worker.sdk_worker_main:main": _BEAMS_WAY,
    f"{_MONITORS}.cpu_monitor:CPUMonitor": "a run has no metrics of its CPU and memory",
    f"{_MONITORS}.disk_monitor:DiskMonitor": "a run has no metrics of its disk",
    f"{_MONITORS}.network_monitor:NetworkMonitor": "a run has no metrics of its network",
    f"{_MONITORS}.gpu_monitor:GPUMonitor": "a run has no metrics of its GPUs",
}
"""`module:name`, and what is done where an installed version lacks it."""


def find(name: str, default: Any = None) -> Any:
    """The object of one of `NAMES`, or `default` where the installed version of its package has no such name."""
    without = NAMES[name]
    module, _, path = name.partition(":")
    try:
        return operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        LOGGER.debug("no %s: %s (%s)", name, without, error)
        return default
