"""Vectors of floats for numba, for loops that LLVM does not turn into good vector code by itself: how many rows stay in
registers decides how often the others are read.

An array's elements are named by their place in its memory, counted in elements: of contiguous arrays alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.extending import models, register_model

#: Floats of a vector: a register of AVX-512, else one of AVX or two of Neon.
LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _BITS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_CONTRACT = ("contract",)
#: What it returns is called without the first argument, which no type checker knows.
intrinsic: Any = extending.intrinsic


class Vector(types.Type):
    """`LANES` floats."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = Vector()


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """What it is in LLVM."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _elementwise(make: Callable[..., Any], num_args: int) -> Callable[..., Any]:
    """An operation on vectors that `make(builder, ...)` builds."""
    signature = vector(*[vector] * num_args)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return make(builder, *args)

    if num_args == 1:
        return intrinsic(lambda typing, a: (signature, codegen))
    if num_args == 2:
        return intrinsic(lambda typing, a, b: (signature, codegen))
    return intrinsic(lambda typing, a, b, c: (signature, codegen))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _maximum(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _exp(builder: Any, x: Any) -> Any:
    """Cephes' polynomial, without a branch: e^x = 2^n e^r. What adding 1.5 * 2^23 rounds x / ln 2 to stands in the
    lowest bits; ln 2 is taken in two parts, of which n times the first is exact."""

    def const(value: float) -> Any:
        return ir.Constant(_VECTOR, [value] * LANES)

    x = builder.select(builder.fcmp_ordered("<", x, const(-87.0)), const(-87.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, const(88.0)), const(88.0), x)
    shifted = _multiply_add(builder, x, const(1.44269502162933349609375), const(12582912.0))
    n = builder.fsub(shifted, const(12582912.0))
    r = _multiply_add(builder, n, const(-0.693359375), x)
    r = _multiply_add(builder, n, const(2.12194440e-4), r)
    p = const(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5, 1.0, 1.0):
        p = _multiply_add(builder, p, r, const(term))
    biased = builder.add(builder.bitcast(shifted, _BITS), ir.Constant(_BITS, [127] * LANES))
    power = builder.shl(biased, ir.Constant(_BITS, [23] * LANES))
    return builder.fmul(p, builder.bitcast(power, _VECTOR))


#: a * b + c, rounded once where the CPU can.
multiply_add = _elementwise(_multiply_add, 3)
add = _elementwise(lambda builder, a, b: builder.fadd(a, b), 2)
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b), 2)
divide = _elementwise(lambda builder, a, b: builder.fdiv(a, b), 2)
#: The larger one; `a` where one of them is no number.
maximum = _elementwise(_maximum, 2)
#: e to the x, to 1e-7 of it, between -87 and 88 and held there beyond; of NaN it is NaN.
exp = _elementwise(_exp, 1)


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """A vector of nothing but `x`."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _spread(builder, args[0], LANES)

    return vector(types.float32), make


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """A vector's elements of `array`, from `index` on."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_place(context, builder, signature.args[0], _VECTOR, *args), align=4)

    return vector(array, types.intp), make


@intrinsic
def load_16_bits(typing: Any, array: Any, index: Any) -> Any:
    """A vector made of elements of 16 bits, from `index` on: an array of int16 holds those of bfloat16, one of uint16
    those of float16."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        element = ir.HalfType() if kind.dtype == types.uint16 else ir.IntType(16)
        stored = builder.load(_place(context, builder, kind, ir.VectorType(element, LANES), *args), align=2)
        if kind.dtype == types.uint16:
            return builder.fpext(stored, _VECTOR)
        bits = builder.shl(builder.zext(stored, _BITS), ir.Constant(_BITS, [16] * LANES))
        return builder.bitcast(bits, _VECTOR)

    return vector(array, types.intp), make


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Put a vector into `array`, from `index` on."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], _place(context, builder, signature.args[0], _VECTOR, args[0], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), make


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Have the CPU fetch what lies at `index` of `array`; any index will do."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _place(context, builder, signature.args[0], ir.IntType(8), *args)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [pointer, *(ir.Constant(_INT, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), make


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """The largest of a vector's elements."""
    return types.float32(vector), lambda context, builder, signature, args: _fold(builder, args[0], _maximum, 1)


@intrinsic
def sum_of(typing: Any, x: Any) -> Any:
    """The sum of a vector's elements."""
    return types.float32(vector), lambda context, builder, signature, args: _fold(builder, args[0], _add, 1)


@intrinsic
def store_sums(typing: Any, array: Any, index: Any, scale: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Put `scale` times the sums of four vectors into `array`, from `index` on."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, c, d = args[3:]
        half = LANES // 2
        ab, cd = _add_halves(builder, a, b, half), _add_halves(builder, c, d, half)
        four = _fold(builder, _add_halves(builder, ab, cd, half // 2), _add, 4)
        sums = builder.fmul(four, _spread(builder, args[2], 4))
        builder.store(sums, _place(context, builder, signature.args[0], four.type, args[0], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32, *[vector] * 4), make


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b)


def _add_halves(builder: Any, a: Any, b: Any, width: int) -> Any:
    """Runs of 2 * `width` lanes of both become runs of `width`: each one's halves added, those of `a` first."""
    low = [n + lane for n in range(0, 2 * LANES, 2 * width) for lane in range(width)]
    return _add(builder, _pick(builder, a, b, low), _pick(builder, a, b, [n + width for n in low]))


def _fold(builder: Any, x: Any, join: Callable[..., Any], num: int) -> Any:
    """Join the lanes of each of `num` equal runs into one; a scalar where there is one run."""
    count = x.type.count
    while count > num:
        width = count // num // 2
        low = [n + lane for n in range(0, count, 2 * width) for lane in range(width)]
        x = join(builder, _pick(builder, x, x, low), _pick(builder, x, x, [n + width for n in low]))
        count //= 2
    return x if num > 1 else builder.extract_element(x, ir.Constant(_INT, 0))


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(lanes)), lanes))


def _spread(builder: Any, x: Any, num: int) -> Any:
    undefined = ir.Constant(ir.VectorType(_FLOAT, num), ir.Undefined)
    first = builder.insert_element(undefined, x, ir.Constant(_INT, 0))
    return _pick(builder, first, first, [0] * num)


def _place(context: Any, builder: Any, kind: Any, pointee: ir.Type, array: Any, index: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())
