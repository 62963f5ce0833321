"""How well two colours are told apart, by the formula of WCAG 2.2."""

import re

import numpy as np


def linear(colour: str) -> np.ndarray:
    """Red, green and blue of `#rrggbb`, in proportion to light."""
    assert re.fullmatch(r"#[0-9a-f]{6}", colour), f"{colour} is no plain colour"
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def between(one: str, other: str, part: float) -> str:
    """As plotly goes from one colour of a scale to the next."""
    ends = [np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in (one, other)]
    return "#" + "".join(f"{round(c):02x}" for c in ends[0] + (ends[1] - ends[0]) * part)
