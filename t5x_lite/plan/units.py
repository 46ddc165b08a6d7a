"""Sizes and times in words, with three digits."""

from collections.abc import Sequence


def binary_bytes(size: float) -> str:
    """Memory: "7.13 GiB"."""
    return _scaled(size, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def decimal_bytes(size: float) -> str:
    """Traffic: "31.4 GB"."""
    return _scaled(size, 1000, ("bytes", "KB", "MB", "GB", "TB", "PB"))


def duration(seconds: float) -> str:
    """The time of a step: "86.2 ms"."""
    return _scaled(seconds * 1e9, 1000, ("ns", "us", "ms", "s"))


def three_digits(value: float) -> str:
    """More before the point: "1,234", "86.2", "0.05"."""
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{decimals}f}"


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while abs(value) >= step * 0.9995 and power < len(units) - 1:
        value /= step
        power += 1
    return f"{value:,.0f} {units[0]}" if power == 0 else f"{three_digits(value)} {units[power]}"
