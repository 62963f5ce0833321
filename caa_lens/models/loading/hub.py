"""Models of the Hugging Face hub: by which id a checkpoint is known, and how it is downloaded.

Every refusal says what to do, and none shows the token.
"""

import json
import re
import sys
from pathlib import Path

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

CONFIG_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
]
WEIGHT_FILES = ["model*.safetensors", "model.safetensors.index.json"]


def cached_id(folder: Path) -> str | None:
    """The hub id of a snapshot in a hub's cache, ``models--owner--name/snapshots/<commit>``; None elsewhere."""
    *_, repo, kind, _ = ("", "", "", *folder.expanduser().resolve().parts)
    if kind != "snapshots" or not repo.startswith("models--"):
        return None
    found = repo.removeprefix("models--").replace("--", "/")
    return found if HUB_ID.fullmatch(found) else None


def checkpoint_id(folder: Path) -> str | None:
    """The hub id that a folder's files are known by: what config.json says, or the folder's place in a hub's cache.

    Never the folder's own name, which anyone may choose. config.json says it as ``_name_or_path``, which is a hub id
    where the model was loaded by one before it was saved.
    """
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        said = None
    return said if isinstance(said, str) and HUB_ID.fullmatch(said) else cached_id(folder)


def download(repo: str, patterns: list[str], revision: str | None) -> Path:
    """The cached folder of a hub repository with the files that match.

    The causes of errors are cut off (``from None``): their text can hold request headers, and so the token.

    Args:
        repo: the Hugging Face id, ``owner/name``.
        patterns: the files to fetch, such as ``CONFIG_FILES``.
        revision: branch, tag or commit; None for the main branch.

    Raises:
        FileNotFoundError: there is no such repository or revision.
        PermissionError: the model is licensed, and access was not granted.
        ConnectionError: the hub cannot be reached, and the files are not in its cache.
    """
    from huggingface_hub import errors, snapshot_download

    # Its client's errors, let through when a download breaks off: httpx until huggingface_hub 2, which has httpx2.
    client = sys.modules[errors.HTTPError.__module__.partition(".")[0]]

    elsewhere = "or load a local folder, a .gguf file or 'demo'"
    page = f"https://huggingface.co/{repo}"
    refused = PermissionError(
        f"access to {repo!r} was refused, expected an account with access: ask for it on its licence page"
        f" {page}, and set the environment variable HF_TOKEN to a token of that account, {elsewhere}"
    )
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise refused from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{page} has no revision {revision!r}: expected a branch, tag or commit") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(
            f"got {repo!r}, which is neither here nor a public model on {page}: check the name (a private"
            f" model needs HF_TOKEN), {elsewhere}"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, client.TransportError):
        raise ConnectionError(
            f"{repo!r} is not in the local cache, and the Hugging Face hub cannot be reached: connect (and"
            f" unset HF_HUB_OFFLINE), {elsewhere}"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise refused from None
        raise ConnectionError(
            f"the Hugging Face hub answered {status} for {repo!r}: try again later, {elsewhere}"
        ) from None
