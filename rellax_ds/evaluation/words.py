"""How figures are written on a page: three decimals, intervals, explicit signs, verdicts."""

from __future__ import annotations

from markupsafe import Markup

_LOWER_IS_BETTER = {"log_loss"}
_MINUS, _TO = "\u2212", "\u2013"


def verdict(metric: str, gap: dict[str, float] | None) -> str:
    """`ahead`, `behind`, or `not separated` when the interval of a difference holds zero."""
    if gap is None or gap["low"] <= 0 <= gap["high"]:
        return "not separated"
    better = (gap["high"] < 0) == (metric in _LOWER_IS_BETTER)
    return "ahead" if better else "behind"


def plain(value: float) -> str:
    """A figure with three decimals and no leading zero, as the field writes it."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def figure(estimate: dict[str, float] | None) -> Markup:
    """Value above its interval, for a table cell."""
    if estimate is None:
        return Markup('<span class="none">not defined</span>')
    return Markup('<b>{}</b><span class="interval">{}{}{}</span>').format(
        plain(estimate["value"]), plain(estimate["low"]), _TO, plain(estimate["high"])
    )


def interval(estimate: dict[str, float] | None) -> str:
    """A figure with its interval, on one line."""
    if estimate is None:
        return "not defined"
    low, high = plain(estimate["low"]), plain(estimate["high"])
    return f"{plain(estimate['value'])} ({low} to {high})"


def sign(value: float) -> str:
    """A difference with an explicit sign."""
    return f"{_MINUS if value < 0 else '+'}{plain(abs(value))}"


def signed(estimate: dict[str, float] | None) -> str:
    """A difference with its interval and explicit signs."""
    if estimate is None:
        return "not defined"
    return f"{sign(estimate['value'])} ({sign(estimate['low'])} to {sign(estimate['high'])})"


def gap(estimate: dict[str, float] | None, metric: str) -> Markup:
    """A difference above its interval, in the colour of its verdict, for a table cell."""
    if estimate is None:
        return Markup('<span class="none">not defined</span>')
    low, high, outcome = sign(estimate["low"]), sign(estimate["high"]), verdict(metric, estimate)
    return Markup('<b class="{}">{}</b><span class="interval">{} to {}</span>').format(
        outcome.replace(" ", "-"), sign(estimate["value"]), low, high
    )


def two_lines(text: str) -> Markup:
    """What stands in brackets below the rest, for a table cell."""
    head, bracket, rest = text.partition(" (")
    if not bracket:
        return Markup("{}").format(text)
    return Markup('{}<span class="interval">{}</span>').format(head, rest.removesuffix(")"))


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds."""
    minutes, rest = divmod(seconds, 60)
    return f"{rest:.1f} s" if minutes < 1 else f"{int(minutes)} min {rest:.0f} s"


def size(num_bytes: int) -> str:
    """Bytes in the unit that fits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
