"""What the registry says of a version: its aliases.

In: a name and the number of a version. Out: the aliases that lead to it now.
"""

from slm_ray.errors import one_line
from slm_ray.tracking.mlflow_runs import client, resolve_uri
from slm_ray.tracking.registry import RegistryError


def version_aliases(name: str, version: str, tracking_uri: str = "") -> tuple[str, ...]:
    """The aliases of a version, sorted. Raises: RegistryError when the store does not say."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = resolve_uri(tracking_uri)
    try:
        return tuple(sorted(client(uri).get_model_version(name, version).aliases))
    except (MlflowException, OSError, SQLAlchemyError) as error:
        raise RegistryError(f"models:/{name}/{version} is not available from {uri}: {one_line(error)}") from error
