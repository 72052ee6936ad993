"""Who made a card: a signature of its folder with a key of one's own, by `model-signing` (OpenSSF).

In: the folder, a key of an elliptic curve in PEM. Out: `card.sig` in the folder; or whether it fits. Nothing is sent
anywhere. The card holds the digests of the model's files, so its signature stands for them too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm_ray.errors import UserError, one_line
from slm_ray.evaluation.card.verification import Difference

SIGNATURE = "card.sig"


def check_private_key(key: str) -> None:
    """Raises: UserError when a card cannot be signed with it, before anything is computed."""
    with _library() as library:
        _signer(library, key)


def sign(folder: Path, private_key: str) -> None:
    """Sign all files of a card's folder.

    Raises:
        UserError: the key cannot be used, or the folder not be written to.
    """
    with _library() as library:
        try:
            _signer(library, private_key).sign(folder, folder / SIGNATURE)
        except OSError as error:
            raise UserError(f"cannot sign {folder}: {error.strerror or error}") from error


def _signer(library: Any, private_key: str) -> Any:
    try:
        signer = library.signing.Config().use_elliptic_key_signer(private_key=Path(private_key))
    except OSError as error:
        raise UserError(f"cannot read the key {private_key}: {error.strerror or error}") from error
    except Exception as error:  # OpenSSL's errors have no common class
        raise UserError(
            f"{private_key} is no private key of an elliptic curve without a password in PEM ({one_line(error)}): "
            "openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
        ) from error
    return signer.set_hashing_config(_all_but_the_signature(library))


def altered_since_signed(path: str, public_key: str) -> Iterator[Difference]:
    """Whether a card's folder is what the owner of a key signed.

    Raises:
        UserError: the folder has no signature, or the key is no public key.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / SIGNATURE).is_file():
        raise UserError(f"{folder} has no {SIGNATURE}: leave out --signed-by, or ask for the signature")
    with _library() as library:
        try:
            verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=Path(public_key))
        except OSError as error:
            raise UserError(f"cannot read the key {public_key}: {error.strerror or error}") from error
        except Exception as error:  # as above
            raise UserError(f"{public_key} is no public key of an elliptic curve: {one_line(error)}") from error
        try:
            verifier.set_hashing_config(_all_but_the_signature(library)).verify(folder, folder / SIGNATURE)
        except Exception as error:  # whatever is wrong, it is not that key's signature of this folder
            yield Difference(SIGNATURE, "a signature", f"none of that key over these files ({one_line(error)})")


def _all_but_the_signature(library: Any) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


@contextmanager
def _library() -> Iterator[Any]:
    try:
        import model_signing
    except ImportError as error:
        raise UserError(f"signatures need {error.name}: pip install 'slm-ray[signing]'") from error
    yield model_signing
