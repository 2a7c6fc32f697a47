"""Keeping transformers quiet in processes whose output people read."""

from __future__ import annotations

from transformers.utils import logging


def quiet_transformers() -> None:
    """Turn off its progress bars and anything below errors, for this process."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
