"""Normal numbers addressed by an index, the same bit for bit on every device and however they are cut into pieces.

Only operations that IEEE 754 or integer arithmetic define exactly are used. The last bit of a maths library's log, cos
or erfinv differs between devices, and between a vector loop and its remainder.
"""

from __future__ import annotations

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the increment of SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

# Giles, "Approximating the erfinv function" (2010), single precision: relative error about 4e-7.
_CENTER = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_TAIL = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)
_LN2 = 0.6931471805599453
_SQRT2 = 1.4142135623730951


def normal_at(key: int, index: torch.Tensor) -> torch.Tensor:
    """Standard normal float64 values at int64 `index`, a pure function of (key, index); |value| is below 8.3."""
    # 52 bits and a half are exact in the 53 bits of a float64.
    uniform = (_shift_right(_split_mix(key, index), 12).double() + 0.5) * 2.0**-51 - 1.0  # in (-1, 1), never the ends
    return _erfinv(uniform).mul_(_SQRT2)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift; torch's own copies the sign bit."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _split_mix(key: int, index: torch.Tensor) -> torch.Tensor:
    """64 mixed bits for every index (SplitMix64: Steele, Lea and Flood, 2014), in wrapping int64 arithmetic."""
    bits = index * _GOLDEN + key
    bits = (bits ^ _shift_right(bits, 30)).mul_(_MIX_1)
    bits = (bits ^ _shift_right(bits, 27)).mul_(_MIX_2)
    return bits ^ _shift_right(bits, 31)


def _erfinv(x: torch.Tensor) -> torch.Tensor:
    # Not 1 - x * x, whose digits are lost to rounding where x is close to 1.
    w = -_log((1.0 - x) * (1.0 + x))
    return torch.where(w < 5.0, _polynomial(_CENTER, w - 2.5), _polynomial(_TAIL, w.sqrt() - 3.0)).mul_(x)


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    """Horner's rule, with the product and the sum rounded separately everywhere (no fused multiply-add)."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value.mul_(x).add_(coefficient)
    return value


def _log(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive x, to about 1e-10: exponent * ln 2 + 2 artanh((m - 1) / (m + 1))."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    ratio = (mantissa - 0.75) / (mantissa + 0.75)  # of mantissa / 0.75, in [2/3, 4/3): |ratio| <= 0.2
    square = ratio * ratio
    # Up to ratio^13: the first term that is left out is at most 2 / 15 * 0.2^15, which is 4e-12.
    series = _polynomial((1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0), square)
    return (series.mul_(ratio).mul_(2.0)).add_(exponent.double() * _LN2).add_(-0.2876820724517809)  # ln 0.75
