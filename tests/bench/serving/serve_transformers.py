"""`transformers.generate` for `serve.py`: one static batch, greedy, as its users write it.

Arguments: see `serve_options.py`. The checkpoint's own folder `model/` is opened; nothing is converted.
"""

import torch
from serve_options import EOS_ID, measure, options
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load the checkpoint, and print the speed."""
    given = options()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model / "model", dtype=torch.float32).eval()

    def write(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor([[EOS_ID, *prompt] for prompt in prompts])
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=EOS_ID,
            )
        return [story[ids.shape[1] :] for story in whole.tolist()]

    measure(given, model.config.vocab_size, write)


if __name__ == "__main__":
    main()
