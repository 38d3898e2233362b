"""Hugging Face models as students and teachers: loading, output head, LoRA, offload, packing."""

from kibitz.models.language_model import LanguageModel

__all__ = ["LanguageModel"]
