"""`prefetch`: ask the memory for a row of an array that is read soon. For use inside numba kernels on the CPU."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = ["prefetch"]

_READ, _KEEP_CLOSE, _DATA = 0, 3, 1  # arguments of llvm.prefetch, LLVM Language Reference, "llvm.prefetch" intrinsic


@intrinsic
def prefetch(typing_context, array, row):  # type: ignore[no-untyped-def]
    """prefetch(array, row): begin to load the first bytes of array[row] into the cache; changes nothing else.

    array: C order, not empty. A row outside of it is harmless.
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = signature.args[0]
        struct = context.make_array(kind)(context, builder, args[0])
        stride = builder.extract_value(struct.strides, 0)
        place = builder.mul(args[1], stride)
        byte = ir.IntType(8).as_pointer()
        address = builder.gep(builder.bitcast(struct.data, byte), [place])
        number = ir.IntType(32)
        kind_of = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind_of)
        builder.call(ask, [address, number(_READ), number(_KEEP_CLOSE), number(_DATA)])
        return context.get_dummy_value()

    return types.void(array, types.uint64), generate
