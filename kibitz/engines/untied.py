"""Folders in which the output head stands for itself, whatever the configuration ties it to.

vLLM 0.32 keeps the old output head of a model with tied embeddings through a reload. So its servers are started with such a
model untied, and every later folder of weights names the output head, too.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from kibitz.config import ModelConfig

HEAD = "lm_head.weight"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
WHOLE, BODY = "model.safetensors", "body.safetensors"
FILE, INDEX = "output-head.safetensors", "model.safetensors.index.json"


def untied_start(section: ModelConfig, root: Path) -> str | None:
    """A folder beside the weights of a run from which a server starts with the student of `section` untied. None where it is
    not tied: the server starts with the student's own."""
    settings = AutoConfig.from_pretrained(section.model, trust_remote_code=section.trust_remote_code)
    if not settings.get_text_config().tie_word_embeddings:
        return None
    source, folder = _folder_of(section.model), root.resolve() / "start"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", FILE, INDEX):
            (folder / path.name).symlink_to(path.resolve())
    tree = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for section_of_tree in (tree, *(tree[key] for key in ("text_config",) if key in tree)):
        section_of_tree["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(tree, indent=2), encoding="utf-8")
    add_head(folder)
    return str(folder)


def add_head(folder: Path) -> None:
    """Write the embeddings as the output head into a folder of safetensors that has none. Where both stand, or neither is found
    under a known name, nothing is done: the probe after the sync says whether that was right."""
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    embeddings = next((name for name in places if name.endswith(EMBEDDINGS)), None)
    if HEAD in places or embeddings is None:
        return
    with safe_open(folder / places[embeddings], framework="pt") as file:
        save_file({HEAD: file.get_tensor(embeddings)}, folder / FILE, metadata={"format": "pt"})
    if (whole := folder / WHOLE).exists():  # readers that find it look for no index
        whole.rename(folder / BODY)
    where = {name: BODY if file == WHOLE else file for name, file in places.items()}
    tree = {"metadata": {}, "weight_map": where | {HEAD: FILE}}
    (folder / INDEX).write_text(json.dumps(tree, indent=2), encoding="utf-8")


def _folder_of(name: str) -> Path:
    """The folder of a model, in the hub's cache if it is a name there."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    found = cached_file(name, "config.json")
    cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    assert found is not None, "its tokenizer has been loaded, and with it its configuration"
    return Path(found).parent
