"""Pinned configurations of the split attention, and how its kernels are compiled ahead of time.

"ahead-of-time" rows were chosen by their resources alone (registers, stack, shared memory), without a GPU. Width is the
channel count: a program holds `GROUP` chunks of `BLOCK_C` output channels in registers, further chunks are other
programs, so the widest class serves any number of channels.
"""

from __future__ import annotations

import functools

from ..aot import POINTERS, Signature, precision_of, register_kernel
from ..configs import Config, register_table
from .backward import split_attention_key_value_backward, split_attention_query_backward
from .forward import split_attention_forward

WIDEST = 384  # the widest class; more channels take its row

# kernel dtype width capabilities tiles warps stages shared_KiB stack provenance
_SHARED = """
{kernel} half 64  all     BLOCK_M=64,BLOCK_N=32,BLOCK_C=64,BLOCK_K=32,GROUP=1  4 2 64 0 ahead-of-time
{kernel} half 384 9.0,10.0 BLOCK_M=64,BLOCK_N=64,BLOCK_C=128,BLOCK_K=64,GROUP=3 8 3 96 0 ahead-of-time
{kernel} half 384 8.0,8.6,8.9 BLOCK_M=64,BLOCK_N=32,BLOCK_C=128,BLOCK_K=64,GROUP=3 8 3 96 0 ahead-of-time
{kernel} half 384 12.0    BLOCK_M=64,BLOCK_N=16,BLOCK_C=128,BLOCK_K=64,GROUP=3 8 2 96 0 ahead-of-time
{kernel} float32 384 all  BLOCK_M=32,BLOCK_N=32,BLOCK_C=64,BLOCK_K=32,GROUP=3  8 1 48 0 ahead-of-time
"""
# Its results have a row a key, and a product by warp groups takes 64 rows: with 32 keys `mma.sync` would stand in.
_WIDE = """
split_attention_key_value half 64 wide BLOCK_M=64,BLOCK_N=64,BLOCK_C=64,BLOCK_K=32,GROUP=1 4 2 64 0 ahead-of-time
"""
_TF32 = """
split_attention_forward   tf32 384 all BLOCK_M=32,BLOCK_N=32,BLOCK_C=64,BLOCK_K=32,GROUP=6 8 2 48 0 ahead-of-time
# 12.0: Triton 3.8 stops at 128 registers and spills 8 bytes, 16 with two stages; 3.6 spills none with one. 8.6 and
# 8.9: 8 bytes under 3.9.
split_attention_query tf32 384 12.0 BLOCK_M=32,BLOCK_N=32,BLOCK_C=64,BLOCK_K=32,GROUP=3 8 1 48 8 ahead-of-time # above
split_attention_query tf32 384 all BLOCK_M=32,BLOCK_N=32,BLOCK_C=64,BLOCK_K=32,GROUP=3 8 2 48 8 ahead-of-time # above
split_attention_key_value tf32 384 all BLOCK_M=32,BLOCK_N=32,BLOCK_C=64,BLOCK_K=32,GROUP=6 8 2 48 0 ahead-of-time
"""
KERNELS = {
    "split_attention_forward": split_attention_forward,
    "split_attention_query": split_attention_query_backward,
    "split_attention_key_value": split_attention_key_value_backward,
}
register_table(_WIDE)  # before the shared row of the same width, so that it is the one taken there
for _name in KERNELS:
    register_table(_SHARED.format(kernel=_name))
register_table(_TF32)

_TOKENS = ("query", "key", "value", "output", "upstream", "query_gradient", "key_gradient", "value_gradient")
_FLOATS = ("row_mean", "threshold", "statistics", "deltas")


def _signature(name: str, config: Config, dtype: str) -> Signature:
    kernel = KERNELS[name]
    arguments = dict.fromkeys(_TOKENS, POINTERS[dtype]) | dict.fromkeys(_FLOATS, "*fp32:16")
    arguments |= {f"{token}_{axis}": "i32:16" for token in ("query", "key", "value", "upstream") for axis in "bn"}
    arguments |= {"n": "i32", "plane": "i32"}
    constants = {"CHANNELS": config.width, "RELEASED": False, "PRECISION": precision_of(dtype)}
    return Signature(kernel, {key: arguments[key] for key in kernel.arg_names if key in arguments}, constants)


for _name in KERNELS:
    register_kernel(_name, functools.partial(_signature, _name))
