"""Sends an exported model to a hub, by the hub's own library. The key is that library's affair: `hf auth login`, or HF_TOKEN."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled


def push(folder: Path, name: str, public: bool = False) -> str:
    """Upload a folder as the model `owner/name`, which is made if it is not there: private, unless it is to be `public`.
    Returns its address."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--push {name}: a model on the hub has an owner and a name: write OWNER/NAME")
    hub = HfApi()
    try:
        place = hub.create_repo(name, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of kibitz export")
    except OfflineModeIsEnabled as error:
        raise ValueError("--push: HF_HUB_OFFLINE is set, and a push goes to the hub: unset it") from error
    except (HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"--push {name}: the hub did not take it: {why}; the model is in {folder}") from error
    return str(place)
