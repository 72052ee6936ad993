"""The graph of a preparation: which transforms follow each other, for a data set and for a tokenizer alone.

In: a pipeline, a plan and a `PrepareConfig`. Out: the pipeline, ready to run; what it makes lies in the staging folder.
Called by `prepare` and `tokenizer_only`.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# Beam's transforms have no types.

from typing import Any

import apache_beam as beam
from apache_beam.pvalue import PCollection

from pipelines.config import TOKENIZER_STORIES, PrepareConfig
from pipelines.transforms import (
    AddInstructions,
    CleanStories,
    DropDuplicates,
    FindDuplicates,
    FindNearDuplicates,
    FitStories,
    KeepCleaned,
    LoadCleaned,
    ReadStories,
    SplitStories,
    TokenizeStories,
    TrainTokenizer,
    WriteShards,
)
from slm_ray.preparation import resume, steps
from slm_ray.preparation.resume import Completed
from slm_ray.sources.plan import SourcePlan
from slm_ray.storage import StoragePath


def build(
    pipeline: beam.Pipeline, plan: SourcePlan, config: PrepareConfig, staged: StoragePath, completed: Completed
) -> PCollection[Any]:
    """A data set. Cleaned ranges wait in `staged`, so that only hashes and the tokenizer's sample are shuffled."""
    folder, given = str(staged), config.given_tokenizer
    ranges = _cleaned_ranges(pipeline, plan, config, folder, completed)
    cleaned = ranges | "LoadFirst" >> LoadCleaned(folder)
    duplicates = cleaned | FindDuplicates()
    if given is not None:
        tokenizer = pipeline | "Tokenizer" >> beam.Create([given.to_json()])
    else:
        tokenizer = cleaned | _trainer(plan, config)
    _ = tokenizer | "SaveTokenizer" >> beam.Map(steps.save_tokenizer, folder=folder)

    distinct = (
        ranges
        | "NotWritten" >> beam.Filter(resume.is_left, written=completed.written)
        | LoadCleaned(folder)
        | DropDuplicates(duplicates)
    )
    if config.near_duplicates is not None:
        near = cleaned | "DropFirst" >> DropDuplicates(duplicates) | FindNearDuplicates(config.near_duplicates)
        distinct = distinct | "DropNear" >> DropDuplicates(near, "near_duplicate")
    stories = distinct | SplitStories(_fractions(plan, config))
    if config.instructions:
        stories = stories | AddInstructions()
    return stories | TokenizeStories(tokenizer) | WriteShards(folder, tokenizer)


def build_tokenizer(
    pipeline: beam.Pipeline, plan: SourcePlan, config: PrepareConfig, staged: StoragePath, completed: Completed
) -> PCollection[Any]:
    """The tokenizer alone: that of the data set that the same options make."""
    folder = str(staged)
    cleaned = _cleaned_ranges(pipeline, plan, config, folder, completed) | "LoadFirst" >> LoadCleaned(folder)
    tokenizer = cleaned | _trainer(plan, config)
    return tokenizer | "SaveTokenizer" >> beam.Map(steps.save_tokenizer, folder=folder)


def _cleaned_ranges(
    pipeline: beam.Pipeline, plan: SourcePlan, config: PrepareConfig, folder: str, completed: Completed
) -> PCollection[Any]:
    """All ranges, once they wait in files."""
    given = config.given_tokenizer
    stories = (
        pipeline | "Tasks" >> beam.Create(completed.left_to_read(plan)) | ReadStories() | CleanStories(config.rules)
    )
    if given is not None and not given.keeps_every_text:
        stories = stories | FitStories(given.to_json(), config.rules)
    new = stories | KeepCleaned(folder)
    earlier = pipeline | "Earlier" >> beam.Create([part for part in plan.ranges if part.number in completed.cleaned])
    return (new, earlier) | beam.Flatten()


def _trainer(plan: SourcePlan, config: PrepareConfig) -> TrainTokenizer:
    share = min(1.0, TOKENIZER_STORIES / plan.n_rows)
    return TrainTokenizer(
        config.trained_vocab_size, share, _fractions(plan, config), config.trained_model, config.instructions
    )


def _fractions(plan: SourcePlan, config: PrepareConfig) -> tuple[float, float]:
    return config.fractions(plan.has_own_validation, plan.has_own_test)
