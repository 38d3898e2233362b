"""Progress bars and reports of transformers and the hub, switched off while kibitz draws its own."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """A context inside which transformers and huggingface_hub draw no progress bars and log errors only: what a loading report
    holds is refused in a sentence. The switches are global to the process, so their former state is restored on leaving."""
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
