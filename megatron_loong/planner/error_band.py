"""How far the model is from published training runs; written by scripts/reproduce.py."""

#: GPU -> training rows on it, the median and the largest of their errors, in percent.
ERROR_BAND = {
    "a100": (5, 19, 32),
    "a800": (5, 7, 15),
    "h100": (13, 7, 16),
    "h200": (4, 6, 7),
}
