"""Model servers over HTTP: vLLM, and what speaks its protocol or OpenAI's. Nothing here knows what is done with an answer.

Keys come from the environment and go into one header: `KIBITZ_API_KEY` to the servers of the recipe, `OPENAI_API_KEY` to
api.openai.com only, because a recipe may name anybody's server. No message, log or file repeats them.
"""

from typing import Any, Protocol

from kibitz.servers.keys import shown


class ServerError(ValueError):
    """A server is down, refuses, or says what cannot be: a sentence that names its address."""


class Asked(Protocol):
    @property
    def name(self) -> str: ...

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any: ...


def served_model(server: Asked, wanted: str | None, key: str) -> tuple[str, dict[str, Any]]:
    """The name of the model to ask for, and what the server says of it. `key` is where the recipe can name one."""
    tree = server.ask("/v1/models")
    rows = tree.get("data") if isinstance(tree, dict) else None
    if not isinstance(rows, list) or not all(_is_model(row) for row in rows):
        raise ServerError(f"{server.name} does not list its models at /v1/models: is it a model server?")
    own = [row for row in rows if not row.get("parent")]
    if wanted is None and len(own) == 1:
        return own[0]["id"], own[0]
    for row in rows:
        if row["id"] == wanted:
            return row["id"], row
    listed = shown(", ".join(row["id"] for row in own)) or "no model"
    raise ServerError(f"{server.name} serves {listed}" + (f" and not {wanted}" if wanted else f": write one as {key}"))


def _is_model(row: Any) -> bool:
    """An entry of the list, whose name can be written in a request, a log and a terminal."""
    return isinstance(row, dict) and isinstance(row.get("id"), str) and row["id"] != "" and row["id"].isprintable()
