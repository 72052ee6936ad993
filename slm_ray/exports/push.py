"""An export to the Hugging Face hub, on request alone.

In: a folder that parity was found in, and a name. Out: the address of the commit. The token is the one that
`huggingface_hub` finds (`HF_TOKEN`, `hf auth login`); it is never read here, and is in no message.
"""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token

from slm_ray.errors import UserError, one_line
from slm_ray.hub_reference import PREFIX, parse_hub_reference

_TOKEN = re.compile(r"\bhf_\w+")
HINT = "set HF_TOKEN or run `hf auth login` first"


def check_push(repo: str) -> None:
    """Refuse before anything is written what cannot be pushed.

    Raises:
        UserError: the name is none of the hub's, or there is no token.
    """
    named = parse_hub_reference(f"{PREFIX}{repo}")
    if named is None or named.revision or named.split or "/" not in named.name:
        raise UserError(f"--push {repo} is not a name of the hub: expected OWNER/NAME")
    if not get_token():
        raise UserError(f"--push {repo} needs a token of the hub: {HINT}")


def push(folder: Path, repo: str, message: str) -> str:
    """Upload all files of a folder into a model's repository, which is made private where there is none.

    Raises:
        UserError: the hub does not take it; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, repo_type="model", commit_message=message)
    except Exception as error:  # every layer below has its own family of exceptions
        why = _TOKEN.sub("hf_...", one_line(error))
        raise UserError(f"the hub does not take {repo} ({why}): {folder} stays, push it again or upload it") from error
    return str(commit.commit_url)
