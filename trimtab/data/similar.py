"""Equal and nearly equal texts, Chinese among them: normal forms, shingles, MinHash with banding.

Near pairs are found by MinHash (Broder 1997) over character shingles and then decided by the exact Jaccard similarity

    J(a, b) = |S(a) & S(b)| / |S(a) | S(b)|

so that no pair is called near by a hash alone. With 32 bands of 4 hashes a pair with J = 0.8 is missed once in 20 million.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

BANDS, ROWS = 32, 4
CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")
NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+)?")
CHINESE_NUMBERS = re.compile("[零〇一二三四五六七八九十百千万亿两]+")
_PRIME = np.uint64(2**31 - 1)


def normal(text: str) -> str:
    """The text in compatibility form (full-width letters, digits and punctuation become plain), blanks as one space each."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def bare(text: str) -> str:
    """The letters and digits of a text alone, in one case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def figures(text: str) -> tuple[str, ...]:
    """The numbers of a text in order, Chinese numerals among them: texts that differ in one say different things.

    A 一 by itself is left out: it is in many words that count nothing (一下, 一共).
    """
    plain = unicodedata.normalize("NFKC", text)
    return (*NUMBERS.findall(plain), *(found for found in CHINESE_NUMBERS.findall(plain) if found != "一"))


def shingles(text: str) -> frozenset[str]:
    """Neighbouring characters of the bare text: pairs where it holds Chinese, Japanese or Korean, else threes."""
    plain = bare(text)
    size = 2 if CJK.search(plain) else 3
    return frozenset(plain[i : i + size] for i in range(max(1, len(plain) - size + 1))) if plain else frozenset()


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """The share that two sets have in common; 0 for two empty ones."""
    return len(a & b) / len(a | b) if a or b else 0.0


def signature(parts: frozenset[str]) -> np.ndarray:
    """MinHash: for each of 128 hash functions the least value over the set."""
    raw = np.random.Philox(key=[20, 26]).random_raw(2 * BANDS * ROWS) % _PRIME
    a, b = raw[::2, None] + np.uint64(1), raw[1::2, None]
    hashed = np.array([zlib.crc32(part.encode()) for part in parts], dtype=np.uint64) % _PRIME
    least: np.ndarray = ((a * hashed[None, :] + b) % _PRIME).min(axis=1)
    return least


def near_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, similarity) with i < j for texts with a Jaccard similarity of at least `threshold`, in order of j, then i."""
    sets = [shingles(text) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for number, parts in enumerate(sets):
        if not parts:
            continue
        bands = signature(parts).reshape(BANDS, ROWS)
        keys = [(band, bands[band].tobytes()) for band in range(BANDS)]
        for other in sorted({found for key in keys for found in buckets[key]}):
            similarity = jaccard(sets[other], parts)
            if similarity >= threshold:
                yield other, number, similarity
        for key in keys:
            buckets[key].append(number)
