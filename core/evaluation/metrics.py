"""ENT, DIST and length as in DialoGPT's paper (arXiv 1911.00536, section 4.2; definitions from arXiv 1809.05972).

All over whitespace tokens, case kept, nothing cleaned. ENT and DIST depend on how much text there is: compare equal
numbers of lines only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence


def ngrams(texts: Iterable[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of `n` tokens stands in `texts`; no run crosses two texts."""
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        tokens = text.split()
        counts.update(zip(*(tokens[start:] for start in range(n)), strict=False))
    return counts


def entropy(texts: Iterable[str], n: int = 4) -> float:
    """ENT-n, in nats; 0 when there are no n-grams."""
    counts = ngrams(texts, n)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values()) if total else 0.0


def distinct(texts: Iterable[str], n: int) -> float:
    """DIST-n: the share of n-grams that are different, 0 to 1."""
    counts = ngrams(texts, n)
    return len(counts) / counts.total() if counts else 0.0


def mean_length(texts: Sequence[str]) -> float:
    """In words."""
    return sum(len(text.split()) for text in texts) / len(texts) if texts else 0.0


def slope(values: Sequence[float]) -> float:
    """Least-squares change per step."""
    middle = (len(values) - 1) / 2
    spread = sum((step - middle) ** 2 for step in range(len(values)))
    return sum((step - middle) * value for step, value in enumerate(values)) / spread if spread else 0.0
