"""Model servers over HTTP: vLLM, and what speaks its protocol or OpenAI's. Nothing here knows what is done with an answer.

Keys come from the environment and go into one header: `KIBITZ_API_KEY` to the servers of the recipe, `OPENAI_API_KEY` to
api.openai.com only, because a recipe may name anybody's server. No message, log or file repeats them.
"""


class ServerError(ValueError):
    """A server is down, refuses, or says what cannot be: a sentence that names its address."""
