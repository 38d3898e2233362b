"""Hugging Face models as students and teachers: loading, output head, LoRA, offload, packing."""

from kibitz.models.language_model import LanguageModel
from kibitz.models.load import load_model, load_student, load_tokenizer, pick_device

__all__ = ["LanguageModel", "load_model", "load_student", "load_tokenizer", "pick_device"]
