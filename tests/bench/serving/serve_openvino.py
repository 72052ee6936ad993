"""OpenVINO GenAI for `serve.py`: its continuous batching, greedy, tokens in and tokens out.

Arguments: see `serve_options.py`; `--backend` names the numbers: `f32`, `bf16`, `bf16-u8` (a cache in a byte), `int8`
(weights in int8, products in bf16 where the machine has them). The checkpoint's folder `model/` is converted by
optimum-intel, once for each kind of weights, into `--exports`.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from serve_options import EOS_ID, measure, options, shape

CACHE_GB = 1
PROPERTIES = {
    "f32": {"INFERENCE_PRECISION_HINT": "f32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
    "bf16-u8": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "u8"},
    "int8": {},
}


def main() -> None:
    """Convert and load the checkpoint, and print the speed."""
    given = options()
    folder = exported(given.model / "model", given.exports, "int8" if given.backend == "int8" else "fp32")
    settings = genai.SchedulerConfig()
    settings.cache_size, settings.max_num_batched_tokens = CACHE_GB, 4096
    settings.max_num_seqs = max(map(int, given.streams.split(",")))
    properties = {"INFERENCE_NUM_THREADS": given.threads, "PERFORMANCE_HINT": "LATENCY"} | PROPERTIES[given.backend]
    pipeline = genai.ContinuousBatchingPipeline(str(folder), settings, "CPU", properties)

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.ignore_eos, config.do_sample = True, False
        inputs = [ov.Tensor(np.array([[EOS_ID, *prompt]], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]

    measure(given, shape(given.model)["vocab_size"], write)


def exported(source: Path, exports: Path, weights: str) -> Path:
    """The model in OpenVINO's form."""
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()[:16]
    folder = exports / f"openvino-{weights}-{digest}"
    if not (folder / "openvino_model.xml").exists():
        words = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(source)]
        words += ["--task", "text-generation-with-past", "--weight-format", weights, str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"optimum-intel does not convert {source}:\n{done.stderr[-2000:]}")
    return folder


if __name__ == "__main__":
    main()
