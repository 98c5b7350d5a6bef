"""The variants of value_pool's kernels that are compiled without a GPU."""

from __future__ import annotations

import torch
import triton

from bench.aot_spec import POINTER, SHARED_BYTES, AotSpec
from lacfast.kernels import launch, value_pool, value_pool_backward, value_pool_tiles


def _pool_spec(
    features: str,
    dim: int,
    heads: int,
    *,
    query: str = "float32",
    weight: str | None,
    split: bool,
    saved: bool,
) -> AotSpec:
    block_l, _, num_warps, _ = launch.pick_launch("value_pool", dim, launch.DEFAULT)
    arguments = {
        "features_ptr": POINTER[features],
        "query_ptr": POINTER[query],
        "norm_weight_ptr": POINTER[weight] if weight else None,
        "pooled_ptr": POINTER[query],
        "partial_ptr": "*fp32" if split else None,
        "extrema_ptr": "*fp32" if split else None,
        "eps": "fp32",
        "BLOCK_L": block_l,
        "BLOCK_D": triton.next_power_of_2(dim),
        "HEADS": value_pool.program_heads(dim, heads),
        "HAS_WEIGHT": weight is not None,
        "IS_SPLIT": split,
        "IS_SAVED": saved,
    }
    arguments |= dict.fromkeys(
        ("tokens_ptr", "log_sum_exp_ptr", "token_stats_ptr"), "*fp32" if saved else None
    )
    arguments |= dict.fromkeys(("L", "D", "Q", "num_splits", "num_groups", "tiles"), "i32")
    name = f"value_pool-{features}-D{dim}-Q{heads}"
    return AotSpec(
        name,
        value_pool.pool_kernel,
        arguments,
        num_warps,
        32,
        value_pool.MAX_REGISTERS,
        converts_layouts=True,
        fp_fusion=True,
    )


VALUE_POOL = [
    _pool_spec("float32", 64, 1, weight=None, split=False, saved=False),
    _pool_spec("float16", 256, 4, weight="float32", split=False, saved=True),
    _pool_spec("float16", 1024, 1, weight="float32", split=True, saved=True),
    _pool_spec("float32", 1536, 4, weight="float32", split=True, saved=False),
    _pool_spec("float16", 512, 4, query="float16", weight="float16", split=True, saved=True),
    _pool_spec("bfloat16", 4096, 16, query="bfloat16", weight="float32", split=True, saved=True),
    _pool_spec("bfloat16", 5120, 16, query="bfloat16", weight="float32", split=True, saved=True),
    AotSpec(
        "value_pool_combine",
        value_pool.combine_kernel,
        {"partial_ptr": "*fp32", "extrema_ptr": "*fp32", "norm_weight_ptr": "*fp32", "pooled_ptr": "*fp32"}
        | {"tokens_ptr": "*fp32", "log_sum_exp_ptr": "*fp32", "D": "i32", "Q": "i32", "num_splits": "i32"}
        | {
            "ALL_SPLITS": value_pool_tiles.MAX_SPLITS,
            "BLOCK_S": value_pool.COMBINE_SPLITS,
            "BLOCK_D": value_pool.COMBINE_BLOCK,
            "HAS_WEIGHT": True,
            "IS_SAVED": True,
        },
        num_warps=value_pool.COMBINE_WARPS,
        converts_layouts=True,
        fp_fusion=True,
    ),
]


_SAVED = {"tokens_ptr": "*fp32", "log_sum_exp_ptr": "*fp32", "token_stats_ptr": "*fp32"}
_SIZES = {"L": "i32", "D": "i32", "Q": "i32"}


def _pool_grad_spec(features: str, dim: int, heads: int, *, along: bool, sums: bool) -> AotSpec:
    block_l, _, num_warps, _ = launch.pick_launch("value_pool", dim, launch.DEFAULT)
    arguments = _SAVED | _SIZES | dict.fromkeys(("num_splits", "num_groups", "tiles"), "i32")
    arguments |= {"features_ptr": POINTER[features], "norm_weight_ptr": "*fp32", "grad_ptr": "*fp32"}
    arguments |= {"partial_ptr": "*fp32" if sums else None}
    arguments |= dict.fromkeys(("along_ptr", "delta_ptr"), "*fp32" if along else None)
    arguments |= {
        "BLOCK_L": block_l,
        "BLOCK_D": triton.next_power_of_2(dim),
        "HEADS": value_pool.program_heads(dim, heads),
    }
    arguments |= {"HAS_WEIGHT": True, "HAS_SUMS": sums, "HAS_ALONG": along}
    name = f"value_pool_grad-{features}-D{dim}-Q{heads}"
    return AotSpec(
        name,
        value_pool_backward.pool_grad_kernel,
        arguments,
        num_warps,
        0,
        value_pool.MAX_REGISTERS,
        converts_layouts=True,
        fp_fusion=True,
    )


def _features_grad_spec(features: str) -> AotSpec:
    block_l, block_d, num_warps = value_pool_backward.FEATURES_BLOCK
    arguments = _SAVED | _SIZES | {"features_ptr": POINTER[features], "grad_features_ptr": POINTER[features]}
    arguments |= dict.fromkeys(
        ("query_ptr", "norm_weight_ptr", "grad_ptr", "along_ptr", "delta_ptr"), "*fp32"
    )
    arguments |= {"BLOCK_L": block_l, "BLOCK_D": block_d, "HAS_WEIGHT": True}
    name = f"value_pool_features_grad-{features}"
    return AotSpec(
        name,
        value_pool_backward.features_grad_kernel,
        arguments,
        num_warps,
        converts_layouts=True,
        fp_fusion=True,
    )


_POINTERS = ("partial_ptr", "query_ptr", "norm_weight_ptr", "tokens_ptr", "grad_ptr", "grad_query_ptr")

VALUE_POOL_BACKWARD = [
    _pool_grad_spec("float32", 64, 1, along=True, sums=True),
    _pool_grad_spec("float16", 256, 4, along=False, sums=True),
    _pool_grad_spec("float16", 1024, 4, along=False, sums=True),
    _pool_grad_spec("float32", 1536, 4, along=True, sums=True),
    _pool_grad_spec("float16", 512, 4, along=True, sums=False),
    _pool_grad_spec("bfloat16", 4096, 16, along=True, sums=True),
    _pool_grad_spec("bfloat16", 5120, 16, along=True, sums=True),
    _features_grad_spec("float32"),
    _features_grad_spec("bfloat16"),
    AotSpec(
        "value_pool_finish_heads",
        value_pool_backward.finish_heads_kernel,
        dict.fromkeys((*_POINTERS, "products_ptr"), "*fp32")
        | {
            "D": "i32",
            "Q": "i32",
            "num_splits": "i32",
            "BLOCK_S": value_pool.COMBINE_SPLITS,
            "BLOCK_D": value_pool.COMBINE_BLOCK,
            "HAS_WEIGHT": True,
        }
        | {"HAS_QUERY_GRAD": True, "HAS_WEIGHT_GRAD": True},
        num_warps=value_pool.COMBINE_WARPS,
        converts_layouts=True,
        fp_fusion=True,
    ),
    AotSpec(
        "value_pool_norm_weight_grad",
        value_pool_backward.norm_weight_grad_kernel,
        {"products_ptr": "*fp32", "grad_norm_weight_ptr": "*fp32", "D": "i32", "rows": "i32"}
        | {"BLOCK_R": value_pool_backward.WEIGHT_BLOCK[0], "BLOCK_D": value_pool_backward.WEIGHT_BLOCK[1]},
        num_warps=value_pool_backward.WEIGHT_BLOCK[2],
        vector_bits=128,
        converts_layouts=True,
        fp_fusion=True,
    ),
]


def _tiles_spec(
    dim: int, *, backward: bool, weight: bool = True, split: bool = True, saved: bool = True
) -> AotSpec:
    """`split`: sums go to `partial`; `saved`: what a backward pass needs is written, or features have one."""
    found = value_pool_tiles.tile_launch(torch.bfloat16, 4096, dim, 4, SHARED_BYTES[90])
    assert found is not None
    constants = {name: value for name, value in found.options.items() if name.isupper()}
    arguments = {"features_ptr": "*bf16", "norm_weight_ptr": "*fp32" if weight else None}
    arguments |= dict.fromkeys(("L", "Q", "num_splits", "num_groups", "tiles"), "i32") | constants
    arguments |= {"partial_ptr": "*fp32" if split else None}
    if backward:
        kernel = value_pool_tiles.pool_grad_tiles_kernel
        arguments |= _SAVED | {"grad_ptr": "*fp32"}
        arguments |= dict.fromkeys(("along_ptr", "delta_ptr"), "*fp32" if saved else None)
    else:
        kernel = value_pool_tiles.pool_tiles_kernel
        arguments |= {"query_ptr": "*fp32", "pooled_ptr": "*fp32", "eps": "fp32"}
        arguments |= {"extrema_ptr": "*fp32" if split else None}
        arguments |= dict.fromkeys(_SAVED, "*fp32" if saved else None)
    return AotSpec(
        f"value_pool_tiles{'_grad' if backward else ''}-D{dim}-{'split' if split else 'whole'}",
        kernel,
        arguments,
        found.options["num_warps"],
        max_registers=255,
        converts_layouts=True,
        fp_fusion=True,
        shared_bytes=value_pool_tiles.shared_bytes_needed(found.options),
    )


VALUE_POOL_TILES = [
    _tiles_spec(1536, backward=False),
    _tiles_spec(1536, backward=True),
    _tiles_spec(3072, backward=False),
    _tiles_spec(3072, backward=True),
    _tiles_spec(64, backward=False, weight=False, split=False, saved=False),
    _tiles_spec(96, backward=False, split=False),
    _tiles_spec(2432, backward=True, split=False),
    _tiles_spec(1152, backward=True, saved=False),
]
