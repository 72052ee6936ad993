"""The steps of the pipeline as Beam transforms: thin wrappers of the pure functions of `slm_ray.preparation.steps`.

In: a PCollection of tasks, which are tuples of `InputRange`. Out: shards and summaries in a folder. Elements are
`(InputRange, RecordBatch)`, so Beam's cost per element is paid once per 4,000 stories. Every callable handed to Beam
lives in the installed package `slm_ray`: workers of any runner import it by name and need neither this folder nor a
pickled main session.
"""

# mypy: disable-error-code="no-untyped-call, no-any-return"
# Beam's transforms have no types.

from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsSingleton, PCollection

from slm_ray.preparation import cleaned_files, near_duplicates, steps
from slm_ray.preparation.cleaning import CleaningRules
from slm_ray.preparation.duplicates import find_duplicates, hash_rows


class ReadStories(beam.PTransform[Any, Any]):
    """Tasks, ranges that are read together, to the raw rows of each range. Spreads them over workers first."""

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Reshuffle() | beam.FlatMap(steps.read_items)


@dataclass
class CleanStories(beam.PTransform[Any, Any]):
    """Clean texts, set a reason for rejected ones, and name each story by a hash."""

    rules: CleaningRules

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(partial(steps.clean_batch, rules=self.rules))


@dataclass
class FitStories(beam.PTransform[Any, Any]):
    """Normalise texts as a given tokenizer does, and reject those that it cannot write."""

    tokenizer_json: str
    rules: CleaningRules

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(partial(steps.fit_batch, tokenizer_json=self.tokenizer_json, rules=self.rules))


@dataclass
class KeepCleaned(beam.PTransform[Any, Any]):
    """Cleaned rows into files of the staging folder; returns the ranges alone, so that nothing large is shuffled."""

    folder: str

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(partial(cleaned_files.keep_cleaned, folder=self.folder))


@dataclass
class LoadCleaned(beam.PTransform[Any, Any]):
    """Ranges to their cleaned rows, which `KeepCleaned` wrote. Spreads the ranges over workers first."""

    folder: str

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Reshuffle() | beam.Map(partial(cleaned_files.load_cleaned, folder=self.folder))


class FindDuplicates(beam.PTransform[Any, Any]):
    """Cleaned rows to `(range number, arrays of rows)` to leave out. Nothing but hashes and positions is shuffled."""

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return (
            pcoll
            | "Hashes" >> beam.FlatMap(hash_rows).with_output_types(tuple[int, Any])
            | "Equal" >> beam.GroupByKey()
            | "NotLowest" >> beam.FlatMap(find_duplicates).with_output_types(tuple[int, Any])
            | "ByRange" >> beam.GroupByKey()
        )


@dataclass
class TrainTokenizer(beam.PTransform[Any, Any]):
    """Cleaned rows to one `tokenizer.json`, learned from a fixed sample of the training stories."""

    vocab_size: int
    share: float  # of the stories, 0 to 1
    fractions: tuple[float, float]  # of validation and test
    model: str = "bpe"  # one of `training.TOKENIZER_MODELS`
    instructions: bool = False  # whether it learns them as well

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        choose = partial(steps.sample_texts, share=self.share, fractions=self.fractions, instructions=self.instructions)
        return (
            pcoll
            | "Choose" >> beam.Map(choose)
            | "Join" >> beam.CombinePerKey(steps.join_samples)
            | "Train" >> beam.Map(partial(steps.train_tokenizer, vocab_size=self.vocab_size, model=self.model))
        )


@dataclass
class DropDuplicates(beam.PTransform[Any, Any]):
    """Set the reason of the rows that were found to repeat another story."""

    duplicates: PCollection[Any]  # from FindDuplicates or FindNearDuplicates
    reason: str = "duplicate"

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(steps.drop_duplicates, duplicates=AsDict(self.duplicates), reason=self.reason)


@dataclass
class SplitStories(beam.PTransform[Any, Any]):
    """Assign each kept story to train, validation or test."""

    fractions: tuple[float, float]  # of validation and test

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(partial(steps.split_batch, fractions=self.fractions))


class AddInstructions(beam.PTransform[Any, Any]):
    """Write an instruction before the text of each kept story."""

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(steps.add_instructions)


@dataclass
class TokenizeStories(beam.PTransform[Any, Any]):
    """Add each kept story's tokens, end-of-text token included."""

    tokenizer: PCollection[Any]  # one element, the content of tokenizer.json

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(steps.tokenize_batch, tokenizer_json=AsSingleton(self.tokenizer))


@dataclass
class WriteShards(beam.PTransform[Any, Any]):
    """Write each range's shards, evidence and summary below a folder."""

    folder: str
    tokenizer: PCollection[Any]  # one element, the content of tokenizer.json

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        return pcoll | beam.Map(steps.write_range, folder=self.folder, tokenizer_json=AsSingleton(self.tokenizer))


@dataclass
class FindNearDuplicates(beam.PTransform[Any, Any]):
    """Cleaned rows to `(range number, arrays of rows)` to leave out. Only signatures and positions are shuffled.

    Rows with a reason take no part. All signatures meet under one key, 136 bytes a story, 310 at the peak: see
    `near_duplicates`.
    """

    threshold: float  # similarity, 0.1 to 1

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection[Any]) -> PCollection[Any]:
        find = partial(near_duplicates.find_near_duplicates, threshold=self.threshold)
        return (
            pcoll
            | "Sign" >> beam.FlatMap(near_duplicates.sign_rows).with_output_types(tuple[int, Any])
            | "Together" >> beam.GroupByKey()
            | "NotLowest" >> beam.FlatMap(find).with_output_types(tuple[int, Any])
            | "ByRange" >> beam.GroupByKey()
        )
