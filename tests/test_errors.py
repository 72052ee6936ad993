"""What errors say: no user, password or query of an address."""

import pickle

import pytest

from slm_ray.errors import UserError, one_line, without_secrets
from slm_ray.tracking.registry import RegistryError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:secret@host:5000", "http://host:5000"),
        ("http://me@host/path", "http://host/path"),
        ("http://me:se@cr/et@host/x is away", "http://host/x is away"),
        ("http://me:se#cr?et@host/x", "http://host/x"),
        ("(https://host/a.csv?X-Amz-Signature=ab) twice https://me:x@b", "(https://host/a.csv) twice https://b"),
        ("postgresql+psycopg2://me:secret@db:5432/ml?password=x", "postgresql+psycopg2://db:5432/ml"),
        ("API request to http://u:p@h/api failed: HTTPConnectionPool(host='h', port=80)",
         "API request to http://h/api failed: HTTPConnectionPool(host='h', port=80)"),
        ("http://host:5000/models@champion", "http://host:5000/models@champion"),
        ("s3://bucket/part-?.txt and s3://bucket/a@b", "s3://bucket/part-?.txt and s3://bucket/a@b"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("models:/stories@champion is no address? me@home=1", "models:/stories@champion is no address? me@home=1"),
    ],
)  # fmt: skip
def test_an_address_in_a_text_has_no_login_and_no_query(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(UserError(text)) == str(RegistryError(text)) == one_line(ValueError(text)) == shown
    assert str(pickle.loads(pickle.dumps(RegistryError(text)))) == shown
