"""Numbers of bytes as people write them."""

import re

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4,
          "KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4}  # fmt: skip


def bytes_of(text: str) -> int:
    """8GiB, 500 MB, 24G (of 1000) or plain bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text, re.IGNORECASE)
    if found is None:
        raise ValueError(f"must be bytes, such as 8GiB, 500MB or 8589934592, got {text!r}")
    return int(float(found[1]) * _UNITS[(found[2] or "").upper()])


def shown(size: float) -> str:
    """In GiB or MiB, to three digits or as many as it takes."""
    unit, name = (1 << 30, "GiB") if size >= 1 << 30 else (1 << 20, "MiB")
    value = size / unit
    return f"{value:,.0f} {name}" if value >= 100 else f"{value:.3g} {name}"
