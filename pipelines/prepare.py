"""`python pipelines/prepare.py`: from a source of stories to a data-set folder, by an Apache Beam pipeline.

In: `--source`. Out: the folder of `slm_ray/dataset/shards.py`, its manifest last. First command of the flow;
`slm_ray/train.py` reads what it leaves. The same source and parameters give the same bytes on any runner, with any
number of workers.
"""

if __name__ == "__main__":
    import logging
    import sys
    from pathlib import Path

    # Beam warns of absent cloud packages while it is imported, and logs each error that it raises as well.
    logging.basicConfig(level=logging.CRITICAL, format="prepare: %(message)s")
    logging.getLogger("slm_ray").setLevel(logging.WARNING)  # what this project warns of is for the user
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, in place of this folder
    from pipelines import runner_names
    from slm_ray.cli import lean, script
    from slm_ray.config.resuming import asks_for_help

    def import_job() -> None:
        """All of the job at once, but for `--help`. Local jobs get it without what they need not: half a second.

        With another runner a job may be in a cloud.
        """
        if asks_for_help(sys.argv[1:]):
            return
        if runner_names.asks_for_direct(sys.argv[1:]):
            with lean.without("boto3", "pandas", "pymongo", "requests"):
                import apache_beam  # noqa: F401
                import pyarrow

                pyarrow.array([0])  # asks for pandas once
        import pipelines.job  # noqa: F401

    script.run("pipelines.prepare", first=import_job)

from collections.abc import Sequence

from pipelines import options
from slm_ray.cli.command import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line: parse, prepare, say what became of the stories."""
    beam_options, config = options.parse(argv)
    from pipelines import job  # with Beam, which `--help` need not wait for

    job.run(beam_options, config)
    return 0
