"""Which version a replica serves, told to MLflow: since when, where, and until when.

In: the rollout of a replica. Out: a run of the kind `deployment` (`tracking/deployments.py`). A folder that nobody
registered has no run that it comes from, and leaves none.
"""

from serve.models.rollout import Rollout
from slm_ray.tracking.deployments import DeploymentLog, Served


class DeploymentRecord:
    """Looks at what is current whenever it is asked, and tells the store what has changed."""

    def __init__(self, rollout: Rollout, log: DeploymentLog) -> None:
        self._rollout, self._log = rollout, log
        self._known = ""

    def look(self) -> None:
        """Returns at once; a thread tells the store."""
        model = self._rollout.current
        if model.identity == self._known or not model.is_registered:
            self._log.repeat()
            return
        self._known = model.identity
        version = model.version
        self._log.serve(Served(version.name, version.version, version.run_id))

    def end(self) -> None:
        """Nothing is served any more; waits a few seconds for the store."""
        self._log.end()
