"""kibitz: on-policy distillation of language models.

The student writes its own rollouts, a fixed teacher scores every token of them, and the student learns from the scores:

    import kibitz

    run = kibitz.train("recipe.yaml", ["optim.lr=1e-4"])
    print(run.evals[-1], run.folder)
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Recipe", "RecipeError", "Run", "__version__", "load_recipe", "train"]

_HOMES = {
    "Recipe": ("kibitz.config", "Recipe"),
    "RecipeError": ("kibitz.config", "RecipeError"),
    "load_recipe": ("kibitz.config", "load"),
    "Run": ("kibitz.training.trainer", "Run"),
    "train": ("kibitz.training.trainer", "train"),
}


def __getattr__(name: str):
    """Public names load when they are first used, so that `import kibitz` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kibitz' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
