"""Progress bars of transformers and the hub, switched off while kibitz draws its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """A context inside which transformers and huggingface_hub draw no progress bars. The switch is global to
    the process, so its former state is restored on leaving."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
