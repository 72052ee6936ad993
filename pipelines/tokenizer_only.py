"""`prepare.py --tokenizer-only`: learn a tokenizer from stories and write it, without a data set.

In: a plan. Out: a folder with `tokenizer.json`, and for Unigram SentencePiece's `.model` and `.vocab`, to be named by
`--tokenizer` later. It is the tokenizer of the data set that the same options make.
"""

from collections import Counter

from apache_beam.options.pipeline_options import PipelineOptions

from pipelines import graph, runners, terminal
from pipelines.config import PrepareConfig
from slm_ray import storage
from slm_ray.cli.signals import ending_on_interrupt
from slm_ray.dataset.manifest import TOKENIZER
from slm_ray.errors import UserError
from slm_ray.preparation import staging
from slm_ray.preparation.cleaned_files import load_cleaned
from slm_ray.preparation.rejections import refuse_too_many
from slm_ray.preparation.resume import Completed
from slm_ray.sources.plan import SourcePlan
from slm_ray.storage import StoragePath
from slm_ray.tokenization.to_sentencepiece import sentencepiece_files
from slm_ray.tokenization.tokenizer import Tokenizer


def train(beam_options: PipelineOptions, config: PrepareConfig, plan: SourcePlan) -> str:
    """Run the first half of the pipeline, publish the tokenizer, and say in words what it is.

    Raises:
        UserError: the folder holds something else, or no story is left to learn from.
    """
    parameters = config.parameters(plan.has_own_validation, plan.has_own_test)
    key = staging.job_key(plan.source["digest"], {**parameters, "tokenizer_only": True})
    with runners.user_errors(config.folder):
        staged = staging.begin_tokenizer(config.folder, key, force=config.force)
        completed = Completed.of(staged)
        with (
            runners.own_temporary_folder(beam_options) as remove,
            ending_on_interrupt(remove),
            terminal.progress(staged, len(plan.ranges), has_shards=False),
            runners.make_pipeline(beam_options, staged) as pipeline,
        ):
            graph.build_tokenizer(pipeline, plan, config, staged, completed)
        n_kept = _check_stories(config, plan, staged)
        tokenizer = Tokenizer.load(staged / TOKENIZER)
        write_sentencepiece(staged, tokenizer)
        written = staging.publish_tokenizer(config.folder, staged)
    return (
        f"tokenizer  {tokenizer.vocab_size:,} entries ({config.trained_model}) of {n_kept:,} stories, "
        f"sha256 {tokenizer.sha256}\nin {config.folder}: {', '.join(written)}; use it with --tokenizer {config.folder}"
    )


def write_sentencepiece(folder: StoragePath, tokenizer: Tokenizer) -> None:
    """Write the files that SentencePiece opens, where the tokenizer has them."""
    for name, content in sentencepiece_files(tokenizer).items():
        storage.replace_file(folder / name, content)


def _check_stories(config: PrepareConfig, plan: SourcePlan, staged: StoragePath) -> int:
    """How many stories were not rejected."""
    reasons: Counter[str | None] = Counter()
    for part in plan.ranges:
        _, batch = load_cleaned(part, str(staged))
        reasons.update(batch["reason"].to_pylist())
    n_kept = reasons.pop(None, 0)
    rejected = {reason: count for reason, count in reasons.items() if reason is not None}
    refuse_too_many(rejected, plan.n_rows, config.max_rejected, f"the cleaned ranges below {staged}")
    if not n_kept:
        raise UserError(f"no story is left to learn from, of {plan.n_rows} read")
    return n_kept
