"""Compile every kernel for Hopper at the 1B's shapes, on a machine without a GPU: `python -m tests.kernels.hopper`.

The interpreter lets pass what the compiler refuses (a variable with two shapes, say).
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hrm_text.kernels import attention_hopper, streamed
from hrm_text.kernels.attention import _decode, splits_for, tile
from hrm_text.kernels.attention_many import BLOCK, EXTRA_PROGRAMS, MAX_PIECES, _decode_many, stages_for
from hrm_text.kernels.first import _first
from hrm_text.kernels.gemm import _gemm, tile_for
from hrm_text.kernels.linear import (
    MAX_TOKENS,
    TILE_ROWS,
    _in_registers,
    _on_tensor_cores,
    register_columns,
    register_tile,
    tensor_core_parts,
)
from hrm_text.kernels.pointwise import COLUMNS, ROPE_ROWS, PrefillBatch, _factors, _gate, _rms, _rope_write, _swiglu
from hrm_text.kernels.staged import COPIES, Geometry, code_for
from hrm_text.kernels.swiglu import _scaled_swiglu

HIDDEN, WIDE, HEADS, DIM = 1536, 4096, 12, 128
FLOATS = {"scale", "eps"}
FLOAT32 = {"cos_sin_ptr", "factors_ptr", "partial_ptr", "stats_ptr", "squares_ptr", "next_squares_ptr"}
INT64 = {"positions_ptr", "write_slots_ptr", "ids_ptr"}
INT32 = {"table_ptr", "row_starts_ptr", "lengths_ptr", "arrivals_ptr"}


def kind(name: str) -> str:
    """Type of an argument, by its name."""
    if not name.endswith("_ptr"):
        return "fp32" if name in FLOATS else "i32"
    return "*fp32" if name in FLOAT32 else "*i64" if name in INT64 else "*i32" if name in INT32 else "*bf16"


def compile_kernel(kernel: Any, constants: dict[str, Any], warps: int, most: int | None = None) -> int:
    """Bytes of shared memory that the kernel takes on an H100 or H200, with at most `most` registers."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # As at a launch: tensors and their widths are multiples of 16.
    aligned = [name for name in names if name not in constants and (name.endswith("_ptr") or kind(name) == "i32")]
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in aligned
        if name not in ("tokens", "requests", "piece")
    }
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": warps, "launch_pdl": constants.get("PDL", False)} | ({"maxnreg": most} if most else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert most is None or registers_and_stack(compiled.asm["cubin"])[0] <= most
    return int(compiled.metadata.shared)


def registers_and_stack(code: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of what does not fit into them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        run = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", run.stdout)
    assert found is not None, run.stdout
    return int(found[1]), int(found[2])


def check_cuda(title: str, compile_code: Callable[[], bytes], most: int, least: int = 0) -> None:
    """That NVRTC, where it is, fits a kernel into `most` registers, and gives it `least`, which are dealt by eights."""
    try:
        registers, stack = registers_and_stack(compile_code())
    except Exception as reason:  # the bindings raise what they like when a library is not there
        if "NVRTC:" in str(reason):
            raise
        print(title, "no NVRTC here")
        return
    assert stack == 0 and least - 8 < registers <= most
    print(title, "registers", registers)


def compile_quack() -> None:
    """Its products, where it is installed; launches are left out, and what the driver would be asked is made up."""
    os.environ |= {"CUTE_DSL_ARCH": "sm_90a", "QUACK_ARCH": "90"}  # read when it is imported
    try:
        from cutlass.utils import HardwareInfo
        from quack.epilogue.frontend import EpiMod, EpiPlan

        from hrm_text.kernels import quack_products
    except ImportError as error:
        print("quack:", error)
        return
    x, out, factors = torch.zeros(300, 256).bfloat16(), torch.zeros(300, 512).bfloat16(), torch.ones(300)
    weight, products, gemm = torch.zeros(512, 256).bfloat16(), quack_products.QuackProducts(), EpiMod.gemm
    slots, caches = torch.arange(300), torch.zeros(2, 20, 16, 1, 128).bfloat16()
    batch = PrefillBatch(slots, slots, 16, torch.zeros(300, 128))
    with (
        patch.object(HardwareInfo, "__init__", lambda *_: None),
        patch.object(HardwareInfo, "get_max_active_clusters", lambda *_, **__: 66),
        patch.object(EpiPlan, "run"),
        patch.object(EpiMod, "gemm", lambda *args, **options: gemm(*args, **options, _launch=False)),
    ):
        print("quack gqkv", products.gqkv(x, factors, weight, batch, *caches)[0].shape)
        print("quack add", products.add(out, x, weight).shape)
        print("quack swiglu", products.swiglu(x, factors, weight).shape)


def main() -> None:
    """Compile them all and print what shared memory each takes."""
    for rows, width, norm, swiglu, residual in (
        (4 * HIDDEN, HIDDEN, True, False, False),
        (HIDDEN, HIDDEN, False, False, True),
        (WIDE, HIDDEN, True, True, False),
        (HIDDEN, WIDE, False, False, True),
    ):
        shape = {"K": width, "NORM": norm, "SWIGLU": swiglu, "RESIDUAL": residual}
        block, warps = register_tile(width)
        for copies in (1, COPIES) if swiglu or residual else (0,):
            geometry = Geometry.of(rows * (2 if swiglu else 1), width, norm, swiglu, residual, 132, copies)
            title = f"staged {geometry.rows} {width} {geometry.shared_bytes} copies {copies}"
            check_cuda(title, partial(code_for, geometry), geometry.registers)
        for tokens in streamed.TOKENS:
            whole = rows * (2 if swiglu else 1)
            division = streamed.Geometry.of(whole, width, norm, swiglu, residual, tokens)
            title = f"streamed {whole} {width} {division.shared_bytes} tokens {tokens}"
            least = streamed.LEAST_REGISTERS if division.launched_warps > division.warps else 0
            check_cuda(title, partial(streamed.code_for, division), division.registers, least)
    for tokens, division_of_contexts in attention_hopper.TILES.items():
        title = f"attention {tokens} {division_of_contexts.shared_bytes}"
        check_cuda(title, partial(attention_hopper.code_for, division_of_contexts), attention_hopper.REGISTERS)
        one = {"BLOCK": block, "COLUMNS": register_columns(width), "PDL": True}
        print("in registers", rows, width, compile_kernel(_in_registers, shape | one, warps))
        warps, columns = tensor_core_parts(width)
        few = {"TOKENS": MAX_TOKENS, "BLOCK": TILE_ROWS, "PARTS": warps, "COLUMNS": columns, "PDL": True}
        print("on tensor cores", rows, width, compile_kernel(_on_tensor_cores, shape | few, warps))
        part = tile_for(rows * (2 if swiglu else 1), width, torch.bfloat16)
        for group in (64, 128):
            many = {
                "K": width, "TOKENS": group, "BLOCK": part.block, "DEPTH": part.depth, "SPLITS": part.splits,
                "EARLY": part.early, "STAGES": part.stages, "SQUARES": 24 if norm else 0, "ALL_SQUARES": 32,
                "SWIGLU": swiglu, "RESIDUAL": residual, "NEXT_SQUARES": 24 if residual else 0, "PDL": True,
            }  # fmt: skip
            print("gemm", group, rows, width, compile_kernel(_gemm, many, part.warps * group // 64))
    for page, ragged in ((1, True), (1, False), (16, False)):
        line = {1: HEADS * DIM, 16: 2 * DIM}[page]  # SGLang's pool, vLLM's cache
        head = {1: DIM, 16: page * line}[page]
        strides = {"PAGE": {1: line, 16: HEADS * head}[page], "LINE": line, "HEAD": head}
        both = {f"{name}_{part}": stride for name in "KV" for part, stride in strides.items()} | {
            "HEADS": HEADS, "DIM": DIM, "PAGE": page, "OFFSETS": tl.int32, "RAGGED": ragged, "PDL": True,
        }  # fmt: skip
        many = {
            "HIDDEN": HIDDEN, "WIDE": 2048, "REQUESTS": 128, "EXTRA": EXTRA_PROGRAMS, "PIECES": MAX_PIECES,
            "BLOCK": BLOCK, "STAGES": stages_for(64),
        }  # fmt: skip
        for norm in (True, False):
            print("attention of many", page, norm, compile_kernel(_decode_many, both | many | {"NORM": norm}, 1))
        for tokens in (1, 8):
            splits = splits_for(tokens, HEADS)
            block, stages, warps, most = tile(splits)
            few = {"SPLITS": splits, "BLOCK": block, "STAGES": stages, "COPIES": COPIES}
            print("attention", page, tokens, compile_kernel(_decode, both | few, warps, most))
    one = {"ROWS": 1, "PDL": True}
    kinds = ((1, 0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 1, 1, 0, 0), (0, 1, 1, 1, 0), (0, 1, 1, 0, 1))
    for flags in kinds:
        what = dict(zip(("SUM", "NORM", "ADD", "BLOCKS", "SQUARES"), map(bool, flags), strict=True))
        print("rms", compile_kernel(_rms, {"HIDDEN": HIDDEN, "WIDE": 2048} | what | one, 4))
    for blocks, squares in ((True, False), (False, True), (False, False)):
        kind_of_x = {"HIDDEN": HIDDEN, "WIDE": 2048, "BLOCKS": blocks, "SQUARES": squares}
        print("first", compile_kernel(_first, kind_of_x | one, 4))
    print("factors", compile_kernel(_factors, {"PARTS": 8, "WIDE": 8, "ROWS": 64, "PDL": True}, 4))
    for scale in (True, False):
        rope = {"PAGE": 16, "HALF": DIM // 2, "HEADS": 16, "SCALE": scale}
        print("rope", compile_kernel(_rope_write, rope | one | {"ROWS": ROPE_ROWS}, 8))
        print("gate", compile_kernel(_gate, {"WIDTH": HIDDEN, "WIDE": 2048, "SCALE": scale} | one, 4))
    print("swiglu of a prefill", compile_kernel(_swiglu, {"COLUMNS": COLUMNS} | one, 4))
    compile_quack()
    print("swiglu", compile_kernel(_scaled_swiglu, {"HIDDEN": HIDDEN, "WIDE": 2048, "BLOCK": 1024, "PDL": True}, 4))


if __name__ == "__main__":
    main()
