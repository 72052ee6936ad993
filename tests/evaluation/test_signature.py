"""A card's folder is signed with a key of one's own, and nothing in it can be exchanged unseen."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("model_signing")
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from slm_ray import evaluate
from slm_ray.evaluation.card.signature import altered_since_signed
from slm_ray.tokenization.tokenizer import Tokenizer
from tests.support.saved_models import save_talkative


def write_keys(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signed")


@pytest.fixture(scope="module")
def keys(place: Path) -> tuple[Path, Path]:
    return write_keys(place)


@pytest.fixture(scope="module")
def options(place: Path, tiny_tokenizer: Tokenizer, tiny_data: Path) -> list[str]:
    model = save_talkative(place / "tiny", tiny_tokenizer, seq_len=48)
    return ["--model", str(model), "--data", str(tiny_data)]


@pytest.fixture(scope="module")
def signed(place: Path, keys: tuple[Path, Path], options: list[str]) -> Path:
    folder = place / "card"
    assert evaluate.main([*options, "--card", str(folder), "--beginnings", "1", "--sign", str(keys[0])]) == 0
    return folder


def test_a_signed_card_is_true_and_its_maker_s(
    signed: Path, keys: tuple[Path, Path], options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main([*options, "--verify", str(signed), "--signed-by", str(keys[1])]) == 0
    assert capsys.readouterr().out.startswith("equal: ")


@pytest.mark.parametrize("name", ["card.json", "card.md", "card.html", "loss.png", "another.txt", ".gitignore"])
def test_no_file_can_be_exchanged_or_added(
    signed: Path,
    keys: tuple[Path, Path],
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    folder = shutil.copytree(signed, tmp_path / "card")
    with (folder / name).open("ab") as file:
        file.write(b"\n")
    assert evaluate.main([*options, "--verify", str(folder), "--signed-by", str(keys[1])]) == 1
    out = capsys.readouterr().out
    assert out.startswith("not equal: card.sig is ") and len(out.splitlines()) == 1


def test_another_s_signature_is_not_the_maker_s(signed: Path, tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    assert len(list(altered_since_signed(str(signed / "card.json"), str(public)))) == 1


def test_an_older_signature_goes_with_its_card(
    signed: Path, options: list[str], keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(signed, tmp_path / "card")
    assert evaluate.main([*options, "--card", str(folder), "--beginnings", "2"]) == 0
    assert json.loads((folder / "card.json").read_text())["made_with"]["beginnings"] == 2
    assert evaluate.main([*options, "--verify", str(folder), "--signed-by", str(keys[1])]) == 2
    assert "has no card.sig" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--card", "card", "--sign", "no.pem"], "cannot read the key no.pem"),
        (["--card", "card", "--sign", "text.pem"], "text.pem is no private key of an elliptic curve"),
        (["--card", "card", "--beginnings", "1", "--sign", "half.pem"], "half.pem is no private key"),
        (["--sign", "key.pem"], "give its folder with --card"),
        (["--signed-by", "key.pem"], "give the card with --verify"),
        (["--verify", "signed", "--signed-by", "half.pem"], "half.pem is no public key"),
        (["--verify", "signed", "--signed-by", "no.pem"], "cannot read the key no.pem"),
    ],
)
def test_a_bad_key_is_one_line_and_2(
    signed: Path,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(signed, "signed")
    Path("text.pem").write_text("my key")
    Path("half.pem").write_text("".join(f"-----{word} PRIVATE KEY-----\nAAAA\n" for word in ("BEGIN", "END")))
    assert evaluate.main([*options, *more]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert not Path("card").exists()
