"""What operations on single numbers are in C++."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .arguments import Kwargs, OpOverload
from .values import CannotGenerate, Expression, converted, literal

__all__ = ["ELEMENTWISE", "Operands", "elementwise"]

aten = torch.ops.aten
Operands = Sequence[Any]  # expressions, numbers of Python, None


def _formula(text: str) -> Callable[..., str]:
    """Makes a rule of a formula in ``{0}``, ``{1}``, ...: all operands have the result's type."""
    return lambda *operands: "(" + text.format(*operands) + ")"


_ONE = {
    "neg": "-{0}",
    "exp": "v_exp({0})",
    "expm1": "v_expm1({0})",
    "log": "v_log({0})",
    "log1p": "v_log1p({0})",
    "sqrt": "v_sqrt({0})",
    "rsqrt": "1 / v_sqrt({0})",
    "reciprocal": "1 / {0}",
    "square": "{0} * {0}",
    "abs": "size_of({0})",
    "sign": "sel(gt({0}, nil({0})), nil({0}) + 1, sel(lt({0}, nil({0})), nil({0}) - 1, nil({0})))",
    "tanh": "v_tanh({0})",
    "sigmoid": "v_sigmoid({0})",
    "relu": "sel(gt({0}, nil({0})) | is_nan({0}), {0}, nil({0}))",
    "silu": "{0} * v_sigmoid({0})",
    "lgamma": "v_lgamma({0})",
    "digamma": "v_digamma({0})",
    "erf": "v_erf({0})",
    "erfc": "v_erfc({0})",
    "floor": "v_floor({0})",
    "ceil": "v_ceil({0})",
    "trunc": "v_trunc({0})",
    "round": "v_nearbyint({0})",
    "frac": "{0} - v_trunc({0})",
    "log2": "v_log2({0})",
    "log10": "v_log10({0})",
    "exp2": "v_exp2({0})",
    **{
        name: f"v_{name}({{0}})"
        for name in [
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "asinh",
            "acosh",
            "atanh",
        ]
    },
}
# as torch does, from the nearer end
_LERP = "sel(lt(size_of({2}), nil({2}) + 0.5f), {0} + {2} * ({1} - {0}), {1} - ({1} - {0}) * (1 - {2}))"
_NAMES = {  # aten name and overload to a formula of operands in the result's type
    **{f"{name}.default": text for name, text in _ONE.items()},
    "sgn.default": _ONE["sign"],
    "_to_copy.default": "{0}",
    "clone.default": "{0}",
    "detach.default": "{0}",
    "alias.default": "{0}",
    "contiguous.default": "{0}",
    "lift_fresh_copy.default": "{0}",
    "mul.Tensor": "{0} * {1}",
    "mul.Scalar": "{0} * {1}",
    "div.Tensor": "{0} / {1}",
    "div.Scalar": "{0} / {1}",
    "maximum.default": "larger({0}, {1})",
    "minimum.default": "smaller({0}, {1})",
    "clamp_min.default": "larger({0}, {1})",
    "clamp_max.default": "smaller({0}, {1})",
    "clamp_min.Tensor": "larger({0}, {1})",
    "clamp_max.Tensor": "smaller({0}, {1})",
    "atan2.default": "v_atan2({0}, {1})",
    "logaddexp.default": "v_logaddexp({0}, {1})",
    "sigmoid_backward.default": "{0} * (1 - {1}) * {1}",
    "tanh_backward.default": "{0} * (1 - {1} * {1})",
    "threshold_backward.default": "sel(le({1}, {2}), nil({0}), {0})",
    "log_sigmoid_backward.default": "{0} * v_sigmoid(-{1})",
    "silu_backward.default": "{0} * v_sigmoid({1}) * (1 + {1} * (1 - v_sigmoid({1})))",
    "addcmul.default": "{0} + {1} * {2}",
    "addcdiv.default": "{0} + {1} / {2}",
    "lerp.Tensor": _LERP,
    "lerp.Scalar": _LERP,
    "xlogy.Tensor": "sel(is_nan({1}), {1}, sel(eq({0}, nil({0})), nil({0}), {0} * v_log({1})))",
    "special_xlog1py.default": (
        "sel(is_nan({1}), {1}, sel(eq({0}, nil({0})), nil({0}), {0} * v_log1p({1})))"
    ),
}
_RULES: dict[str, Callable[..., str]] = {name: _formula(text) for name, text in _NAMES.items()}
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_LOGIC = {
    **dict.fromkeys(("logical_and.default", "bitwise_and.Tensor", "__and__.Tensor"), "{0} & {1}"),
    **dict.fromkeys(("logical_or.default", "bitwise_or.Tensor", "__or__.Tensor"), "{0} | {1}"),
    **dict.fromkeys(("logical_xor.default", "bitwise_xor.Tensor"), "{0} ^ {1}"),
    **dict.fromkeys(("logical_not.default", "bitwise_not.default"), "~{0}"),
}
_ARITHMETIC = {"add": "{0} + {1}", "sub": "{0} - {1}", "rsub": "{1} - {0}"}


def _name(target: OpOverload) -> str:
    return str(target).removeprefix("aten.")


class _Rule:
    """Applies the rule of one operation to expressions."""

    def __init__(self, dtype: torch.dtype, operands: Operands) -> None:
        self.dtype = dtype
        self.is_vector = any(isinstance(x, Expression) and x.is_vector for x in operands)

    def typed(self, operand: Any, dtype: torch.dtype | None = None) -> str:
        """Returns an operand in a type, by default the result's, as wide as the result."""
        dtype = self.dtype if dtype is None else dtype
        if isinstance(operand, (bool, int, float)):
            expression = literal(operand, dtype)
        elif isinstance(operand, Expression):
            expression = converted(operand, dtype)
        else:
            raise CannotGenerate(f"an operand {operand!r}")
        return (expression.widened() if self.is_vector else expression).code


def _common(operands: Operands) -> torch.dtype:
    """Finds the type in which operands are compared."""
    dtype: torch.dtype | None = None
    for operand in operands:
        if isinstance(operand, Expression):
            dtype = operand.dtype if dtype is None else torch.promote_types(dtype, operand.dtype)
    floats = any(isinstance(x, float) for x in operands)
    if dtype is not None and not dtype.is_floating_point and floats:
        return torch.get_default_dtype()
    return dtype or torch.get_default_dtype()


def _power(rule: _Rule, base: Any, exponent: Any) -> str:
    x = rule.typed(base)
    if isinstance(exponent, (int, float)):
        if exponent == 0.5:
            return f"v_sqrt({x})"
        if exponent == -0.5:
            return f"(1 / v_sqrt({x}))"
        if float(exponent).is_integer() and 1 <= abs(exponent) <= 8:
            product = "(" + " * ".join([x] * abs(int(exponent))) + ")"
            return product if exponent > 0 else f"(1 / {product})"
    if not rule.dtype.is_floating_point:
        raise CannotGenerate("a power of integers")
    return f"v_pow({x}, {rule.typed(exponent)})"


def _given(operands: Operands, kwargs: Kwargs, names: Sequence[str], *defaults: Any) -> Any:
    """Completes operands by name and by default, from the second on."""
    own = [*operands[1:]]
    for name, default in list(zip(names, defaults, strict=True))[len(own) :]:
        own.append(kwargs.get(name, default))
    return [operands[0], *own]


def _clamp(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, low, high = _given(operands, kwargs, ("min", "max"), None, None)
    code = rule.typed(x)
    if low is not None:
        code = f"larger({code}, {rule.typed(low)})"
    return code if high is None else f"smaller({code}, {rule.typed(high)})"


def _logit(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, eps = _given(operands, kwargs, ("eps",), None)
    code = rule.typed(x)
    if eps is not None:
        code = f"smaller(larger({code}, {rule.typed(eps)}), {rule.typed(1.0 - eps)})"
    return f"v_log({code} / (1 - {code}))"


def _logit_backward(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, eps = _given(operands[1:], kwargs, ("eps",), None)
    g, code = rule.typed(operands[0]), rule.typed(x)
    low, high, other = (0.0, 1.0, torch.nan) if eps is None else (eps, 1.0 - eps, 0.0)
    inside = f"ge({code}, {rule.typed(low)}) & le({code}, {rule.typed(high)})"
    slope = f"(({code} + nil({code})) * (1 - {code}))"  # no sign of zero, as in torch
    return f"sel({inside}, {g} / {slope}, {rule.typed(other)})"


def _nan_to_num(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, nan, high, low = _given(operands, kwargs, ("nan", "posinf", "neginf"), 0.0, None, None)
    info, code = torch.finfo(rule.dtype), rule.typed(x)
    high, low = info.max if high is None else high, info.min if low is None else low
    inner = f"sel(lt({code}, {rule.typed(-torch.inf)} * 0.5f), {rule.typed(low)}, {code})"
    for number, is_here in (
        (low, f"eq({code}, {rule.typed(-torch.inf)})"),
        (high, f"eq({code}, {rule.typed(torch.inf)})"),
        (0.0 if nan is None else nan, f"is_nan({code})"),
    ):
        inner = f"sel({is_here}, {rule.typed(number)}, {inner})"
    return inner


def _elu(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    names = ("alpha", "scale", "input_scale")
    x, alpha, scale, inner = _given(operands, kwargs, names, 1.0, 1.0, 1.0)
    code, a, s, i = (rule.typed(part) for part in (x, alpha, scale, inner))
    return f"({s} * sel(gt({code}, nil({code})), {code}, {a} * v_expm1({i} * {code})))"


def _elu_backward(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    grad, alpha, scale, inner, is_result, x = operands
    g, a, s, i, code = (rule.typed(part) for part in (grad, alpha, scale, inner, x))
    below = (
        f"{i} * ({code} + {a} * {s})" if is_result else f"{s} * {a} * {i} * v_exp({i} * {code})"
    )
    return f"({g} * sel(le({code}, nil({code})), {below}, {s}))"


def _softplus(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    parts = _given(operands, kwargs, ("beta", "threshold"), 1.0, 20.0)
    return f"v_softplus({', '.join(rule.typed(part) for part in parts)})"


def _softplus_backward(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    return f"v_softplus_back({', '.join(rule.typed(part) for part in operands)})"


def _leaky(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, slope = (rule.typed(part) for part in _given(operands, kwargs, ("negative_slope",), 0.01))
    return f"sel(gt({x}, nil({x})), {x}, {x} * {slope})"


def _leaky_backward(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    g, x, slope = (rule.typed(part) for part in operands[:3])
    return f"sel(gt({x}, nil({x})), {g}, {g} * {slope})"


def _where(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    condition, yes, no = operands
    chosen = rule.typed(condition, torch.bool)
    return f"sel({chosen}, {rule.typed(yes)}, {rule.typed(no)})"


def _masked_fill(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, mask, value = operands
    return f"sel({rule.typed(mask, torch.bool)}, {rule.typed(value)}, {rule.typed(x)})"


def _cross_entropy(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    """Bernoulli with logits x and value t: (1 - t) x + log(1 + e^-x)."""
    names = ("weight", "pos_weight", "reduction")
    x, t, *options = _given(operands, kwargs, ("target", *names), None, None, None, 1)
    if options != [None, None, 0]:
        raise CannotGenerate("a weighted cross entropy")
    x, t = rule.typed(x), rule.typed(t)
    return f"((1 - {t}) * {x} - v_logsigmoid({x}))"


def _ndtr(rule: _Rule, operands: Operands, kwargs: Kwargs) -> str:
    x, factor, half = (rule.typed(part) for part in (operands[0], -math.sqrt(0.5), 0.5))
    return f"({half} * v_erfc({x} * {factor}))"


_SPECIAL: dict[str, Callable[[_Rule, Operands, Kwargs], str]] = {
    "clamp.default": _clamp,
    "clamp.Tensor": _clamp,
    "hardtanh.default": lambda rule, x, named: _clamp(
        rule, _given(x, named, ("min_val", "max_val"), -1.0, 1.0), {}
    ),
    "logit.default": _logit,
    "logit_backward.default": _logit_backward,
    "nan_to_num.default": _nan_to_num,
    "elu.default": _elu,
    "elu_backward.default": _elu_backward,
    "softplus.default": _softplus,
    "softplus_backward.default": _softplus_backward,
    "leaky_relu.default": _leaky,
    "leaky_relu_backward.default": _leaky_backward,
    "binary_cross_entropy_with_logits.default": _cross_entropy,
    "special_ndtr.default": _ndtr,
    "where.self": _where,
    "where.ScalarSelf": _where,
    "where.ScalarOther": _where,
    "masked_fill.Scalar": _masked_fill,
    "masked_fill.Tensor": _masked_fill,
    "pow.Tensor_Scalar": lambda rule, x, _: _power(rule, *x),
    "pow.Tensor_Tensor": lambda rule, x, _: _power(rule, *x),
    "pow.Scalar": lambda rule, x, _: _power(rule, *x),
}


def elementwise(
    target: OpOverload, operands: Operands, kwargs: Kwargs, dtype: torch.dtype
) -> Expression:
    """Applies an operation to single numbers.

    Args:
        target: The operation.
        operands: Expressions and numbers of Python, by position.
        kwargs: Operands by name.
        dtype: Of the result.

    Returns:
        The result, a vector where any operand is one.

    Raises:
        CannotGenerate: If no rule knows the operation.
    """
    name, rule = _name(target), _Rule(dtype, operands)
    kwargs = {key: value for key, value in kwargs.items() if key not in _IGNORED}
    short, _, overload = name.partition(".")
    if name in _SPECIAL:
        code = _SPECIAL[name](rule, operands, kwargs)
    elif dtype is torch.bool and name in _OF_BOOLEANS:  # masks are no numbers
        sign = _OF_BOOLEANS[name]
        code = "(" + f" {sign} ".join(rule.typed(x, torch.bool) for x in operands[:2]) + ")"
    elif short in _ARITHMETIC and overload in ("Tensor", "Scalar"):
        alpha = kwargs.pop("alpha", operands[2] if len(operands) > 2 else 1)
        left, right = (rule.typed(x) for x in operands[:2])
        if alpha != 1:
            factor, scaled = rule.typed(alpha), 0 if short == "rsub" else 1
            left, right = (
                (f"({factor} * {left})", right) if scaled == 0 else (left, f"({factor} * {right})")
            )
        code = "(" + _ARITHMETIC[short].format(left, right) + ")"
    elif short in _COMPARISONS:
        common = _common(operands)
        code = f"{short}({', '.join(rule.typed(x, common) for x in operands)})"
    elif name == "isnan.default":
        code = f"is_nan({rule.typed(operands[0], operands[0].dtype)})"
    elif name == "isinf.default":
        x = rule.typed(operands[0], operands[0].dtype)
        code = f"eq(size_of({x}), {rule.typed(torch.inf, operands[0].dtype)})"
    elif name in _LOGIC:
        if dtype is not torch.bool:
            raise CannotGenerate(f"{name} of integers")
        code = "(" + _LOGIC[name].format(*(rule.typed(x, torch.bool) for x in operands)) + ")"
    elif name in _RULES:
        kwargs.pop("value", None) if name.startswith("addc") and kwargs.get("value") == 1 else None
        code = _RULES[name](*(rule.typed(x) for x in operands if not _is_option(x)))
    else:
        raise CannotGenerate(f"no native code for {target}")
    if kwargs and name not in _SPECIAL:
        raise CannotGenerate(f"{target} with {sorted(kwargs)}")
    return Expression(code, dtype, rule.is_vector)


_OF_BOOLEANS = {
    "mul.Tensor": "&",
    "minimum.default": "&",
    "add.Tensor": "|",
    "maximum.default": "|",
}

_IGNORED = ("dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking")


def _is_option(operand: Any) -> bool:
    return operand is None or isinstance(operand, (torch.dtype, torch.memory_format))


ELEMENTWISE = frozenset(
    {*_RULES, *_SPECIAL, *_LOGIC, "isnan.default", "isinf.default"}
    | {f"{short}.{kind}" for short in _ARITHMETIC for kind in ("Tensor", "Scalar")}
    | {f"{short}.{kind}" for short in _COMPARISONS for kind in ("Tensor", "Scalar")}
)
