"""One preparation: the source planned, the pipeline run into a staging folder, the data set published.

In: Beam's options and a `PrepareConfig`. Out: the folder of `slm_ray/dataset/shards.py`, its manifest last, and what
the terminal says of it.
"""

import sys
import threading

from apache_beam.options.pipeline_options import PipelineOptions

from pipelines import explain, graph, runners, terminal, tokenizer_only
from pipelines.config import PrepareConfig
from pipelines.report import figures, report
from slm_ray import storage
from slm_ray.cli.signals import ending_on_interrupt
from slm_ray.dataset.manifest import FORMAT_VERSION, MANIFEST, REJECTED, TOKENIZER, Manifest, fingerprint, load_manifest
from slm_ray.errors import UserError
from slm_ray.locks.lease import Lease
from slm_ray.preparation import staging, summary, summary_files
from slm_ray.preparation.rejections import ADVICE, refuse_too_many
from slm_ray.preparation.resume import Completed
from slm_ray.sources import addresses, discovery, plan, sample
from slm_ray.sources.plan import SourcePlan
from slm_ray.tokenization.tokenizer import END_OF_TEXT, Tokenizer


def run(beam_options: PipelineOptions, config: PrepareConfig) -> None:
    """Plan, prepare, publish, and print what became of the stories; or only what the options ask about them.

    Raises:
        UserError: the source, the folder or the options do not allow it.
    """
    if config.explain is not None:
        print(explain.explain(config.folder, addresses.as_text(config.explain)))
        return
    runners.refuse_private_memory(beam_options, config.folder)
    runners.prepare_workers(beam_options, config.given_tokenizer)
    plan = make_plan(config)
    with staging.locked(config.folder) as lease:
        with runners.user_errors(config.folder):
            was_interrupted = staging.finish_publishing(config.folder)
        if was_interrupted:
            print(f"finished what an interrupted job had begun to publish in {config.folder}", file=sys.stderr)
        if config.tokenizer_only:
            print(tokenizer_only.train(beam_options, config, plan))
            return
        earlier = earlier_data_set(config, plan)
        if earlier is not None:
            with runners.user_errors(config.folder):
                staging.discard(config.folder, job_key(config, plan))
            print(f"{config.folder} already holds this data set; nothing to do (--force prepares it again)")
            print(terminal.account(earlier, config.folder, {}))
            return
        if plan.source["why"]:
            print(terminal.fallback_notice(plan.source["why"], plan.n_rows), file=sys.stderr)
        manifest, found = prepare(beam_options, config, plan, lease)
        for warning in (*terminal.warnings(manifest), *(f"warning: {note}" for note in found.notes)):
            print(warning, file=sys.stderr)
        print(terminal.account(manifest, config.folder, found.examples))


def make_plan(config: PrepareConfig) -> SourcePlan:
    """Find the inputs and cut them into ranges."""
    with terminal.planning() as on_bytes:
        return plan.plan_source(
            config.sources,
            validation_source=config.validation_source or None,
            max_stories=config.max_stories,
            text_column=config.text_column,
            cut_text=config.cut_text,
            piece_chars=config.piece_chars,
            seed=config.seed,
            on_bytes=on_bytes,
            on_paths=lambda paths: staging.refuse_own_files(paths, config.folder),
        )


def job_key(config: PrepareConfig, plan: SourcePlan) -> str:
    """What names this job and no other in the staging folder."""
    return staging.job_key(plan.source["digest"], config.parameters(plan.has_own_validation, plan.has_own_test))


def earlier_data_set(config: PrepareConfig, plan: SourcePlan) -> Manifest | None:
    """The data set that is already there, if it is whole and the one asked for; None if there is work to do.

    Raises:
        UserError: it is another one, and not to be replaced.
    """
    with runners.user_errors(config.folder):
        if config.force or not storage.exists(config.folder / MANIFEST):
            return None
    try:
        manifest = load_manifest(config.folder)
    except UserError as error:
        raise UserError(f"{error}, with --force") from error
    if not (_is_same(manifest, config, plan) or _is_other_auto(manifest, config)):
        raise UserError(
            f"{config.folder} holds a data set from another source or other parameters: "
            "choose another --output, or replace it with --force"
        )
    damage = staging.damage(config.folder, manifest)
    if damage is not None:
        print(f"preparing again: {damage}", file=sys.stderr)
        return None
    return manifest


def prepare(
    beam_options: PipelineOptions, config: PrepareConfig, plan: SourcePlan, lease: Lease
) -> tuple[Manifest, summary.DataSummary]:
    """Run the pipeline into a staging folder, check that no story was lost, and publish the data set."""
    parameters = config.parameters(plan.has_own_validation, plan.has_own_test)
    staged = staging.begin(config.folder, job_key(config, plan))
    with runners.user_errors(config.folder):
        completed = Completed.of(staged)
    if completed.cleaned or completed.written:
        print(terminal.continuation_notice(completed, len(plan.ranges)), file=sys.stderr)
    with runners.user_errors(config.folder):
        # Beam waits for workers that may never have begun; what is finished is in files, so nothing is lost by leaving
        shown = terminal.progress(staged, len(plan.ranges))
        with runners.own_temporary_folder(beam_options) as remove, ending_on_interrupt(remove), shown:
            if len(completed.written) < len(plan.ranges) or not storage.exists(staged / TOKENIZER):
                threading.Thread(target=figures.preload, daemon=True).start()
                with runners.make_pipeline(beam_options, staged) as pipeline:
                    graph.build(pipeline, plan, config, staged, completed)
        found = summary.merge(summary_files.load_summaries(staged))
        summary.check(found, plan.n_rows)
        refuse_too_many(found.reasons, found.read, config.max_rejected, str(staged / REJECTED))
        _refuse_nothing(found)
        tokenizer = Tokenizer.load(staged / TOKENIZER)
        manifest = make_manifest(plan, parameters, tokenizer, found)
        if manifest.trained_model == "unigram":
            tokenizer_only.write_sentencepiece(staged, tokenizer)
        report.write(staged / staging.REPORT, manifest, found, tokenizer)
        lease.check()
        staging.publish(config.folder, staged, manifest)
    return manifest, found


def make_manifest(
    plan: SourcePlan, parameters: dict[str, object], tokenizer: Tokenizer, found: summary.DataSummary
) -> Manifest:
    """All that identifies the data set, and its fingerprint."""
    return Manifest(
        format_version=FORMAT_VERSION,
        source=plan.source,
        parameters=parameters,
        tokenizer={
            "file": TOKENIZER,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "end_token": END_OF_TEXT,
            "end_token_id": tokenizer.eos_id,
        },
        splits=found.splits,
        rejected=found.rejected,
        counts=found.counts,
        fingerprint=fingerprint(
            source_digest=plan.source["digest"],
            parameters=parameters,
            tokenizer_sha256=tokenizer.sha256,
            splits=found.splits,
        ),
    )


def _is_same(manifest: Manifest, config: PrepareConfig, plan: SourcePlan) -> bool:
    wanted = config.parameters(plan.has_own_validation, plan.has_own_test)
    return manifest.source["digest"] == plan.source["digest"] and manifest.parameters == wanted


def _is_other_auto(manifest: Manifest, config: PrepareConfig) -> bool:
    """Whether it was made by the same words, `auto`, when the network was otherwise: then it is kept."""
    if (config.sources, manifest.source["requested"]) != (("auto",), "auto") or config.validation_source:
        return False
    files = manifest.source["files"]
    rows = sum(file["rows"] for file in files if file["split"] is None)
    is_sample = manifest.source["used"] == "sample"
    if is_sample and files[0]["sha256"] != sample.sample_digest(config.seed):
        return False
    default = discovery.SAMPLE_STORIES if is_sample else discovery.AUTO_STORIES
    wanted = config.parameters(*(any(file["split"] == split for file in files) for split in ("validation", "test")))
    return rows == (config.max_stories or default) and manifest.parameters == wanted


def _refuse_nothing(found: summary.DataSummary) -> None:
    if not found.splits["train"].rows:
        reason, count = max(found.reasons.items(), key=lambda item: item[1], default=("other split", found.read))
        hint = f": {ADVICE[reason]}" if reason in ADVICE else ""
        raise UserError(
            f"no story is left for training of {found.read} read; most frequent reason: {reason} ({count}){hint}"
        )
