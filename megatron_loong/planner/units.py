"""Numbers as people write and read them."""

from __future__ import annotations

import argparse


def tokens(text: str) -> int:
    """A length in tokens; K and M stand for 1024 and 1024 x 1024.

    >>> tokens("128K"), tokens("1M"), tokens("1.5M"), tokens("4096")
    (131072, 1048576, 1572864, 4096)
    """
    factor = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1)
    try:
        value = float(text[:-1]) * factor if factor > 1 else int(text)
        if value != int(value) or value < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a length of at least 1 token; write 131072, 128K or 1M"
        ) from None
    return int(value)


def length(tokens: int) -> str:
    """A length as people say it, where it is a round one.

    >>> length(131072), length(1048576), length(1572864), length(212992), length(5000), length(1 << 22)
    ('128K', '1M', '1.5M', '208K', '5000', '4M')
    """
    if tokens % (1 << 17) == 0 and tokens >= 1 << 20:
        return f"{tokens / (1 << 20):.10g}M"
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)


def number(value: float) -> str:
    """Three digits or more, never an exponent.

    >>> number(109.81), number(25547.3), number(0.01234), number(1e-5)
    ('110', '25,547', '0.0123', '0.00001')
    """
    if abs(value) >= 100:
        return f"{value:,.0f}"
    plain = f"{value:.3g}"
    return f"{value:.12f}".rstrip("0") if "e" in plain else plain


def duration(seconds: float) -> str:
    """A time in the two units that fit its size.

    >>> duration(25547), duration(59.96), duration(13.65), duration(0.00283), duration(2e-5), duration(3599.7)
    ('7 h 6 min', '1 min 0 s', '13.7 s', '2.83 ms', '20 us', '1 h 0 min')
    """
    if not seconds:
        return "0 s"
    if seconds < 59.95:
        for unit, factor in (("s", 1.0), ("ms", 1e3)):
            if seconds * factor >= 0.9995:
                return f"{number(seconds * factor)} {unit}"
        return f"{number(seconds * 1e6)} us"
    large, small, per_large, unit_s = ("d", "h", 24, 3600)
    if round(seconds) < 3600:
        large, small, per_large, unit_s = ("min", "s", 60, 1)
    elif round(seconds / 60) < 24 * 60:
        large, small, per_large, unit_s = ("h", "min", 60, 60)
    whole, rest = divmod(round(seconds / unit_s), per_large)
    return f"{whole:,} {large} {rest} {small}"
