"""Pinned configurations of the attention kernels, and how they are compiled ahead of time.

"ahead-of-time" rows were chosen by their resources alone (registers, stack, shared memory), without a GPU. On 9.0 a
warp group takes 64 rows of a product, and those of attention lie one above the other: 8 warps on 64 rows compute
everything twice, which rows for 9.0 avoid where nothing spills. Under Triton 3.9 four rows for TF32 and four for
float32 keep a few words of their operands in a stack ("3.9: 40 B"); what that costs was not measured.
"""

from __future__ import annotations

import functools

from ..aot import POINTERS, Signature, precision_of, register_kernel
from ..configs import Config, register_table
from ..matching import match_precision
from .backward import attention_backward_key_value, attention_backward_query
from .forward import attention_forward
from .tiles import split_dim

TABLE = """
# kernel                      dtype   dim where       tiles                                  warps stages KiB stack from
context_forward               half    96  mma         BLOCK_M=128,BLOCK_N=64,BLOCK_S=16,HOIST=1  8 3 72  0 ahead-of-time
context_forward               half    96  wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=16,HOIST=1  8 3 96  0 ahead-of-time
context_forward               half    128 8.0,8.6,8.9 BLOCK_M=128,BLOCK_N=64,BLOCK_S=16,HOIST=1  8 3 96  0 ahead-of-time
context_forward               half    128 12.0        BLOCK_M=128,BLOCK_N=32,BLOCK_S=16,HOIST=1  8 3 64  0 ahead-of-time
context_forward               half    128 wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=16,HOIST=1  8 3 129 0 ahead-of-time
context_forward               half    192 mma         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 32  0 ahead-of-time
context_forward               half    192 9.0         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   4 2 72  0 ahead-of-time
context_forward               half    192 10.0        BLOCK_M=64,BLOCK_N=64,BLOCK_S=16,HOIST=0   8 2 120 0 ahead-of-time
context_forward               half    256 mma         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 2 64  0 ahead-of-time
context_forward               half    256 wide        BLOCK_M=64,BLOCK_N=64,BLOCK_S=16,HOIST=0   8 2 161 0 ahead-of-time
memory_forward                half    96  mma         BLOCK_M=128,BLOCK_N=16,BLOCK_S=32,HOIST=1  8 3 36  0 ahead-of-time
memory_forward                half    96  wide        BLOCK_M=128,BLOCK_N=16,BLOCK_S=32,HOIST=1  8 3 49  0 ahead-of-time
memory_forward                half    128 mma         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=1   4 2 28  0 ahead-of-time
memory_forward                half    128 wide        BLOCK_M=128,BLOCK_N=16,BLOCK_S=32,HOIST=1  8 2 57  0 ahead-of-time
memory_forward                half    192 8.0,8.6,8.9 BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   8 1 40  0 ahead-of-time
memory_forward                half    192 12.0        BLOCK_M=64,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 32  0 ahead-of-time
memory_forward                half    192 9.0         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   4 2 48  0 ahead-of-time
memory_forward                half    192 10.0        BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   8 2 52  0 ahead-of-time
memory_forward                half    256 mma         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   8 2 52  0 ahead-of-time
memory_forward                half    256 9.0         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   4 1 48  0 ahead-of-time
memory_forward                half    256 10.0        BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   8 2 81  0 ahead-of-time
memory_context_forward        half    96  8.0,8.6,8.9 BLOCK_M=128,BLOCK_N=64,BLOCK_S=32,HOIST=1  8 2 56  0 ahead-of-time
memory_context_forward        half    96  12.0        BLOCK_M=64,BLOCK_N=64,BLOCK_S=32,HOIST=1   8 2 36  0 ahead-of-time
memory_context_forward        half    96  wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=32,HOIST=1  8 3 96  0 ahead-of-time
memory_context_forward        half    128 mma         BLOCK_M=64,BLOCK_N=64,BLOCK_S=32,HOIST=0   8 2 48  0 ahead-of-time
memory_context_forward        half    128 wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=32,HOIST=1  8 3 129 0 ahead-of-time
memory_context_forward        half    192 mma         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 56  0 ahead-of-time
memory_context_forward        half    192 9.0         BLOCK_M=128,BLOCK_N=32,BLOCK_S=32,HOIST=0  8 2 113 0 ahead-of-time
memory_context_forward        half    192 10.0        BLOCK_M=64,BLOCK_N=64,BLOCK_S=32,HOIST=0   8 2 120 0 ahead-of-time
memory_context_forward        half    256 mma         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 52  0 ahead-of-time
memory_context_forward        half    256 wide        BLOCK_M=64,BLOCK_N=32,BLOCK_S=32,HOIST=0   8 2 97  0 ahead-of-time
context_backward_query        half    96  mma         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=1   8 2 36  0 ahead-of-time
context_backward_query        half    96  wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=16,HOIST=1  8 2 96  0 ahead-of-time
context_backward_query        half    128 mma         BLOCK_M=64,BLOCK_N=64,BLOCK_S=16,HOIST=0   8 2 48  0 ahead-of-time
context_backward_query        half    128 wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=16,HOIST=1  8 2 145 0 ahead-of-time
context_backward_query        half    192 mma         BLOCK_M=32,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 20  0 ahead-of-time
context_backward_query        half    192 9.0         BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   4 2 97  0 ahead-of-time
context_backward_query        half    192 10.0        BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 2 97  0 ahead-of-time
context_backward_query        half    256 8.0,8.6,8.9 BLOCK_M=32,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 32  0 ahead-of-time
context_backward_query        half    256 12.0        BLOCK_M=32,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 24  0 ahead-of-time
context_backward_query        half    256 9.0         BLOCK_M=128,BLOCK_N=32,BLOCK_S=16,HOIST=0  8 2 193 0 ahead-of-time
context_backward_query        half    256 10.0        BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 2 145 0 ahead-of-time
memory_backward_query         half    96  mma         BLOCK_M=128,BLOCK_N=16,BLOCK_S=32,HOIST=1  8 2 54  0 ahead-of-time
memory_backward_query         half    96  wide        BLOCK_M=128,BLOCK_N=16,BLOCK_S=32,HOIST=1  8 2 61  0 ahead-of-time
memory_backward_query         half    128 mma         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   8 2 44  0 ahead-of-time
memory_backward_query         half    128 wide        BLOCK_M=128,BLOCK_N=16,BLOCK_S=32,HOIST=1  8 2 89  0 ahead-of-time
memory_backward_query         half    192 mma         BLOCK_M=64,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 56  0 ahead-of-time
memory_backward_query         half    192 9.0         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   4 2 73  0 ahead-of-time
memory_backward_query         half    192 10.0        BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   8 2 76  0 ahead-of-time
memory_backward_query         half    256 mma         BLOCK_M=64,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 2 74  0 ahead-of-time
memory_backward_query         half    256 9.0         BLOCK_M=64,BLOCK_N=16,BLOCK_S=32,HOIST=0   4 1 81  0 ahead-of-time
memory_backward_query         half    256 10.0        BLOCK_M=64,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 2 113 0 ahead-of-time
memory_context_backward_query half    96  8.0,8.6,8.9 BLOCK_M=64,BLOCK_N=32,BLOCK_S=32,HOIST=1   8 2 36  0 ahead-of-time
memory_context_backward_query half    96  12.0        BLOCK_M=64,BLOCK_N=32,BLOCK_S=16,HOIST=1   8 2 36  0 ahead-of-time
memory_context_backward_query half    96  wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=32,HOIST=1  8 2 96  0 ahead-of-time
memory_context_backward_query half    128 8.0,8.6,8.9 BLOCK_M=64,BLOCK_N=64,BLOCK_S=32,HOIST=0   8 2 48  0 ahead-of-time
memory_context_backward_query half    128 12.0        BLOCK_M=64,BLOCK_N=64,BLOCK_S=16,HOIST=0   8 2 48  0 ahead-of-time
memory_context_backward_query half    128 wide        BLOCK_M=128,BLOCK_N=64,BLOCK_S=32,HOIST=1  8 2 145 0 ahead-of-time
memory_context_backward_query half    192 mma         BLOCK_M=32,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 20  0 ahead-of-time
memory_context_backward_query half    192 9.0         BLOCK_M=128,BLOCK_N=32,BLOCK_S=16,HOIST=0  8 2 145 0 ahead-of-time
memory_context_backward_query half    192 10.0        BLOCK_M=64,BLOCK_N=64,BLOCK_S=16,HOIST=0   8 2 145 0 ahead-of-time
memory_context_backward_query half    256 8.0,8.6,8.9 BLOCK_M=32,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 32  0 ahead-of-time
memory_context_backward_query half    256 12.0        BLOCK_M=16,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 32  0 ahead-of-time
memory_context_backward_query half    256 9.0         BLOCK_M=128,BLOCK_N=32,BLOCK_S=16,HOIST=0  8 2 193 0 ahead-of-time
memory_context_backward_query half    256 10.0        BLOCK_M=64,BLOCK_N=64,BLOCK_S=16,HOIST=0   8 2 225 0 ahead-of-time
context_backward_key_value    half    96  mma         BLOCK_M=16,BLOCK_N=64,HOIST=1              8 2 31  0 ahead-of-time
context_backward_key_value    half    96  wide        BLOCK_M=32,BLOCK_N=128,HOIST=1             8 2 73  0 ahead-of-time
context_backward_key_value    half    128 mma         BLOCK_M=64,BLOCK_N=64,HOIST=0              8 2 49  0 ahead-of-time
context_backward_key_value    half    128 wide        BLOCK_M=32,BLOCK_N=128,HOIST=0             8 2 113 0 ahead-of-time
context_backward_key_value    half    192 mma         BLOCK_M=32,BLOCK_N=32,HOIST=0              8 1 52  0 ahead-of-time
context_backward_key_value    half    192 wide        BLOCK_M=16,BLOCK_N=64,HOIST=0              8 2 73  0 ahead-of-time
context_backward_key_value    half    256 mma         BLOCK_M=32,BLOCK_N=32,HOIST=0              8 1 80  0 ahead-of-time
context_backward_key_value    half    256 wide        BLOCK_M=16,BLOCK_N=64,HOIST=0              8 2 113 0 ahead-of-time
context_forward               float32 256 all         BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 32  0 ahead-of-time
context_forward               tf32    128 all         BLOCK_M=32,BLOCK_N=32,BLOCK_S=32,HOIST=0   8 1 36  0 ahead-of-time
context_forward               tf32    256 all         BLOCK_M=32,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 64  0 ahead-of-time
context_backward_query        float32 256 all         BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 64  0 ahead-of-time
context_backward_query        tf32    128 all         BLOCK_M=32,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 56  0 ahead-of-time
context_backward_query        tf32    256 large       BLOCK_M=16,BLOCK_N=32,BLOCK_S=16,HOIST=0   8 1 128 0 ahead-of-time
context_backward_query        tf32    256 small       BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 80  0 ahead-of-time
memory_forward float32 256 all BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0 8 1 33 24 ahead-of-time # 3.9: 24 B
memory_forward                tf32    128 all         BLOCK_M=32,BLOCK_N=32,BLOCK_S=32,HOIST=0   8 1 48  0 ahead-of-time
memory_forward                tf32    256 all         BLOCK_M=32,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 64  0 ahead-of-time
memory_backward_query float32 256 all BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0 8 1 49 16 ahead-of-time # 3.9: 16 B
memory_backward_query         tf32    128 all         BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0   4 1 32  0 ahead-of-time
memory_backward_query tf32 256 all BLOCK_M=16,BLOCK_N=32,BLOCK_S=16,HOIST=0 8 1 64 40 ahead-of-time # 3.9: 40 B
memory_context_forward float32 256 all BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0 8 1 33 40 ahead-of-time # 3.9: 40 B
memory_context_forward        tf32    128 10.0        BLOCK_M=32,BLOCK_N=32,BLOCK_S=32,HOIST=0   4 1 49  0 ahead-of-time
memory_context_forward        tf32    128 all         BLOCK_M=32,BLOCK_N=32,BLOCK_S=32,HOIST=0   8 1 48  0 ahead-of-time
memory_context_forward        tf32    256 all         BLOCK_M=32,BLOCK_N=16,BLOCK_S=16,HOIST=0   8 1 64  0 ahead-of-time
memory_context_backward_query float32 256 all BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0 8 1 64 32 ahead-of-time # 3.9: 32
memory_context_backward_query tf32 128 all BLOCK_M=32,BLOCK_N=16,BLOCK_S=16,HOIST=0 8 1 56 40 ahead-of-time # 3.9: 40 B
memory_context_backward_query tf32 256 all BLOCK_M=16,BLOCK_N=16,BLOCK_S=16,HOIST=0 8 1 80 40 ahead-of-time # 3.9: 40 B
context_backward_key_value    float32 256 all         BLOCK_M=16,BLOCK_N=16,HOIST=0              8 1 66  0 ahead-of-time
context_backward_key_value    tf32    128 8.6,8.9     BLOCK_M=32,BLOCK_N=16,HOIST=0              8 1 80  0 ahead-of-time
context_backward_key_value    tf32    128 all         BLOCK_M=16,BLOCK_N=32,HOIST=0              8 1 64  0 ahead-of-time
context_backward_key_value tf32 256 10.0 BLOCK_M=16,BLOCK_N=16,HOIST=0 4 1 96 32 ahead-of-time # 3.9: 32 B
context_backward_key_value    tf32    256 all         BLOCK_M=16,BLOCK_N=16,HOIST=0              8 1 96  0 ahead-of-time
"""
register_table(TABLE)

_SCALARS = {"tokens": "i32", "slots": "i32", "clusters": "i32"}
_STRIDES = {f"{name}_{axis}": "i32:16" for name in ("query", "key", "value", "grad") for axis in "bn"}


def _constants(config: Config, dtype: str) -> dict[str, object]:
    dim_a, dim_b = split_dim(config.width, config.dtype)
    return {"DIM": config.width, "DIM_A": dim_a, "DIM_B": dim_b, "PRECISION": precision_of(dtype)}


def _forward(part: str, config: Config, dtype: str) -> Signature:
    """The forward with everything on: it matches, and saves for a backward."""
    context, memory = "context" in part, "memory" in part
    low, floats = POINTERS[dtype], "*fp32:16"
    arguments = dict.fromkeys(("query", "key", "value", "memory", "out"), low)
    arguments |= dict.fromkeys(("context", "context_lse", "memory_lse"), floats)
    arguments |= {"prototypes": floats, "cluster": "*i64:16", **_STRIDES, **_SCALARS}
    constants = _constants(config, dtype) | {
        "BLOCK_K": 64 if memory else 16, "CONTEXT": context, "MEMORY": memory, "MATCH": memory, "SAVE": True,
        "SAVE_CONTEXT": context and config.dtype == "half",
        "MATCH_PRECISION": match_precision(config.dtype),
    }  # fmt: skip
    if not memory:
        constants |= {"memory": None, "prototypes": None}
    return Signature(attention_forward, arguments, constants)


def _backward_query(part: str, config: Config, dtype: str) -> Signature:
    context, memory = "context" in part, "memory" in part
    arguments = dict.fromkeys(("query", "key", "value", "memory", "grad", "query_grad"), POINTERS[dtype])
    arguments |= dict.fromkeys(("context", "context_lse", "memory_lse", "delta"), "*fp32:16")
    arguments |= {"cluster": "*i64:16", **_STRIDES, **_SCALARS}
    constants = _constants(config, dtype) | {
        "CONTEXT": context, "MEMORY": memory, "RECOMPUTE": config.dtype != "half",
    }  # fmt: skip
    absent = [] if memory else ["memory", "cluster", "memory_lse"]
    absent += [] if context else ["context", "context_lse", "delta"]
    return Signature(attention_backward_query, arguments, constants | dict.fromkeys(absent))


def _backward_key_value(config: Config, dtype: str) -> Signature:
    arguments = dict.fromkeys(("query", "key", "value", "grad", "key_grad", "value_grad"), POINTERS[dtype])
    arguments |= {"context_lse": "*fp32:16", "delta": "*fp32:16", **_STRIDES, **_SCALARS}
    return Signature(attention_backward_key_value, arguments, _constants(config, dtype))


for _part in ("context", "memory", "memory_context"):
    register_kernel(f"{_part}_forward", functools.partial(_forward, _part))
    register_kernel(f"{_part}_backward_query", functools.partial(_backward_query, _part))
register_kernel("context_backward_key_value", _backward_key_value)
