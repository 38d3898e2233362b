"""Two tokenizers meet: the same text, cut into the smallest stretches at whose ends a token ends for both of them.

    student   1 | 2 | = | 4 | EOS          spans   12= | 4 | EOS
    teacher   12=       | 4 | </s>

The student writes tokens; their bytes are a text; the teacher reads that text in its own tokens. No model is needed.
"""

from kibitz.teachers.alignment.aligner import Aligner, Alignment, Span

__all__ = ["Aligner", "Alignment", "Span"]
