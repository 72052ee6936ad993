"""The bare torch loop that `train.py` compares with: our model, optimizer and batches, and nothing around them.

No Ray, no validation, no checkpoint, no record: what the machine can give. Arguments: see `peer_options.py`.
"""

import dataclasses

import torch
from peer_options import FOREVER, Stopwatch, options

from slm_ray.config.files import load_config
from slm_ray.dataset.batches import TrainBatches
from slm_ray.dataset.manifest import load_manifest
from slm_ray.dataset.shards import read_split
from slm_ray.dataset.stream import TokenStream
from slm_ray.model.decoder import Decoder
from slm_ray.storage import storage_path
from slm_ray.tokenization.tokenizer import Tokenizer
from slm_ray.training.hardware import resolve_precision
from slm_ray.training.optim import learning_rate, make_optimizer, set_learning_rate
from slm_ray.training.preflight import resolve


def main() -> None:
    """Train, and print the speed, until ended."""
    given = options()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    config = resolve(dataclasses.replace(load_config(given.preset), data=given.data), lambda _: 1)
    data = storage_path(given.data)
    tokens, n_bytes = read_split(data, "train", manifest=load_manifest(data))
    stream = TokenStream.of_split(tokens, n_bytes, Tokenizer.load(data / "tokenizer.json").eos_id)
    batches = TrainBatches.of_stream(
        stream, seq_len=config.model.seq_len, batch_size=given.batch_size, seed=0, rank=0, world_size=1
    )
    model = Decoder(config.model)
    module = torch.compile(model, dynamic=False)
    is_bf16 = resolve_precision("auto", torch.device("cpu")) == "bf16"
    optimizer = make_optimizer(model, config.optim, in_bf16=is_bf16)
    watch = Stopwatch(given, config.model.seq_len)
    for step in range(FOREVER):
        set_learning_rate(optimizer, learning_rate(step, FOREVER, config.optim))
        batch = batches.at(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            loss = module(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)) / batch.n_targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        watch.step(step)


if __name__ == "__main__":
    main()
