"""The steps of the pipeline as Beam transforms: thin wires around the pure functions of `slm_ray.stories`.

In: a PCollection of `InputRange`. Out: shards and summaries in a folder. Elements are `(InputRange,
RecordBatch)`, so Beam's cost per element is paid once per 4,000 stories. Every callable handed to Beam lives in
the installed package `slm_ray`: workers of any runner import it by name and need neither this folder nor a
pickled main session.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsDict, AsSingleton, PCollection

from slm_ray import stories
from slm_ray.text import CleaningRules


class ReadStories(beam.PTransform):
    """Tasks, each of ranges that are read together, to ranges with their raw rows.

    Begins with a reshuffle, which spreads the tasks over the workers and keeps each reading a stage of its own:
    fused with an earlier one, all rows would have to wait in memory for the side inputs of a later step.
    """

    def expand(self, pcoll: PCollection) -> PCollection:
        return pcoll | beam.Reshuffle() | beam.FlatMap(stories.read_items)


@dataclass
class CleanStories(beam.PTransform):
    """Clean texts, give the unfit ones a reason, and name each story by a hash."""

    rules: CleaningRules

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        return pcoll | beam.Map(partial(stories.clean_batch, rules=self.rules))


class FindDuplicates(beam.PTransform):
    """Cleaned rows to `(range number, arrays of rows)` to leave out. Nothing but hashes and positions is shuffled."""

    def expand(self, pcoll: PCollection) -> PCollection:
        return (
            pcoll
            | "Hashes" >> beam.FlatMap(stories.hash_rows).with_output_types(tuple[int, Any])
            | "Equal" >> beam.GroupByKey()
            | "NotLowest" >> beam.FlatMap(stories.find_duplicates).with_output_types(tuple[int, Any])
            | "ByRange" >> beam.GroupByKey()
        )


@dataclass
class TrainTokenizer(beam.PTransform):
    """Cleaned rows to one `tokenizer.json`, learned from a fixed sample of the training stories."""

    vocab_size: int
    share: float  # of the stories, 0 to 1
    fractions: tuple[float, float]  # of validation and test

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        return (
            pcoll
            | "Choose" >> beam.Map(partial(stories.sample_texts, share=self.share, fractions=self.fractions))
            | beam.GroupByKey()
            | "Train" >> beam.Map(partial(stories.train_tokenizer, vocab_size=self.vocab_size))
        )


@dataclass
class DropDuplicates(beam.PTransform):
    """Give all but the lowest of equal stories the reason `duplicate`."""

    duplicates: PCollection  # from FindDuplicates

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        return pcoll | beam.Map(stories.drop_duplicates, duplicates=AsDict(self.duplicates))


@dataclass
class SplitStories(beam.PTransform):
    """Assign each kept story to train, validation or test."""

    fractions: tuple[float, float]  # of validation and test

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        return pcoll | beam.Map(partial(stories.split_batch, fractions=self.fractions))


@dataclass
class TokenizeStories(beam.PTransform):
    """Add each kept story's tokens, end mark included."""

    tokenizer: PCollection  # one element, the content of tokenizer.json

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        return pcoll | beam.Map(stories.tokenize_batch, tokenizer_json=AsSingleton(self.tokenizer))


@dataclass
class WriteShards(beam.PTransform):
    """Write each range's shards, evidence and summary below a folder."""

    folder: str
    tokenizer: PCollection  # one element, the content of tokenizer.json

    def __post_init__(self) -> None:
        super().__init__()

    def expand(self, pcoll: PCollection) -> PCollection:
        return pcoll | beam.Map(stories.write_range, folder=self.folder, tokenizer_json=AsSingleton(self.tokenizer))
