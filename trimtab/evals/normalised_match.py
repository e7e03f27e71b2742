"""Normalised match: the same text to a reader, whatever the keyboard.

Before comparing: Unicode NFKC (full-width letters, digits and most full-width signs become plain ones), lower case, one kind of quotation
mark, no white space beside a Chinese character, runs of white space as one space, no full stop, semicolon or exclamation mark at the end.
"""

from __future__ import annotations

import re
import unicodedata

from trimtab.evals import reference
from trimtab.types import Example

_HAN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_BESIDE_HAN = re.compile(rf"(?<={_HAN})\s+|\s+(?={_HAN})")
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u300c": '"', "\u300d": '"', "`": "'"})  # fmt: skip
_AT_THE_END = " .;!。"


def normalise(text: str) -> str:
    """The text as it is compared."""
    plain = unicodedata.normalize("NFKC", text).translate(_QUOTES).lower()
    return " ".join(_BESIDE_HAN.sub("", plain).split()).rstrip(_AT_THE_END)


def score(predictions: list[str], examples: list[Example]) -> list[float]:
    """1.0 for each prediction that equals its row's reference answer so compared, else 0.0."""
    pairs = zip(predictions, examples, strict=True)
    return [float(normalise(prediction) == normalise(reference(example))) for prediction, example in pairs]
