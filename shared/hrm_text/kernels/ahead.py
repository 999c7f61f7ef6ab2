"""All kernels, compiled side by side before the engine asks for one after the other, the CUDA ones earlier still."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from hrm_text.kernels import attention_hopper, staged, streamed
from hrm_text.kernels.attention import DecodeBatch
from hrm_text.kernels.decode import FusedDecode, KVCaches, kinds_of, why_not
from hrm_text.kernels.launch import capability
from hrm_text.kernels.pointwise import PrefillBatch, factors_of, gate_in_place, rope_write
from hrm_text.kernels.prefill import FusedPrefill, first_layer
from hrm_text.kernels.products import ADD_COLUMNS
from hrm_text.model import HrmTextBody

# One for each set of kernels that differ in what the compiler knows of the batch.
SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512)


def begin_compiling(body: HrmTextBody) -> None:
    """Have the CUDA kernels of decode steps compiled in the background, while the engine reads weights.

    Args:
        body: whose weights have their shapes, if not their numbers yet.
    """
    parameter = next(body.parameters())
    dtype, device = parameter.dtype, parameter.device
    if dtype != torch.bfloat16 or capability(device) != 9 or why_not(body, dtype) is not None:
        return
    kinds, copied = kinds_of(body.shape)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    jobs: list[Callable[[], bytes]] = []
    if all(staged.fits(*kind[:2]) for kind in kinds):
        rings = [staged.Geometry.of(*kind[:5], processors, kind[5]) for kind in copied]
        jobs += [partial(staged.code_for, ring) for ring in rings]
        streams = [streamed.Geometry.of(*kind, tokens) for kind in kinds for tokens in streamed.TOKENS]
        jobs += [partial(streamed.code_for, stream) for stream in streams if stream.fits]
    if body.shape.head_dim == attention_hopper.HEAD_DIM:
        jobs += [partial(attention_hopper.code_for, tile) for tile in attention_hopper.TILES.values()]
    pool = ThreadPoolExecutor(os.cpu_count() or 1, "nvrtc")
    for job in jobs:
        pool.submit(job)
    pool.shutdown(wait=False)


def compile_ahead(
    fused: FusedDecode,
    input_ids: torch.Tensor,
    batch: DecodeBatch,
    caches: KVCaches,
    most: int,
    others: Sequence[Callable[[], object]] = (),
) -> None:
    """Run a layer for batches of up to `most` requests, each size in a thread: compilers rarely hold Python's lock.

    Args:
        fused: whose kernels they are.
        input_ids, batch: the engine's first ones, for what their tensors look like.
        caches: the engine's.
        most: requests that it decodes at once.
        others: calls of the engine's own kernels, to be compiled beside them.
    """
    device = batch.positions.device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return

    def run(job: Callable[[], object]) -> None:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)), torch.inference_mode():
            job()

    jobs: list[Callable[[], object]] = [*others, partial(run_empty_prefill, fused, batch, caches)]
    jobs += [
        partial(run_empty, fused, input_ids, batch, caches, size)
        for size in {min(size, most) for size in (*SIZES, most)}
    ]
    torch.cuda.synchronize(device)  # these streams wait for nobody
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        list(pool.map(run, jobs))
    torch.cuda.synchronize(device)


def run_empty(
    fused: FusedDecode, input_ids: torch.Tensor, batch: DecodeBatch, caches: KVCaches, size: int
) -> torch.Tensor:
    """One layer as a stack for `size` padding requests, which touch no cache, with scratch memory of its own.

    Twice, for what a layer's first kernel takes of the layer before is not what it takes of a stack.
    """
    body, device = fused.body, batch.positions.device
    own = FusedDecode(body, device)
    block, slot = first_layer(body)
    z_H, activations = own.begin(input_ids.new_zeros(size))
    for _ in range(2):
        activations = own.block(activations, block, empty_batch(batch, size), *caches(slot))
    return own.between_stacks(activations, z_H)[0]


def run_empty_prefill(fused: FusedDecode, batch: DecodeBatch, caches: KVCaches) -> torch.Tensor:
    """What a step with prompts has around its attention, for padding, few tokens' and many's."""
    body, size = fused.body, 16
    shape, empty = body.shape, empty_batch(batch, size)
    padding = PrefillBatch(empty.positions, empty.write_slots, empty.page_size, empty.cos_sin)
    zeros = torch.zeros(size, shape.hidden_size, dtype=next(body.parameters()).dtype, device=batch.positions.device)
    gqkv = zeros.new_zeros(size, 4 * shape.num_heads * shape.head_dim)
    rope_write(gqkv, None, padding, *caches(first_layer(body)[1]))
    gate_in_place(gqkv, None, zeros.new_zeros(size, gqkv.shape[1] // 4))
    squares = zeros.new_zeros(size, -(-shape.hidden_size // ADD_COLUMNS), dtype=torch.float32)
    factors_of(squares, shape.hidden_size, shape.rms_norm_eps)
    return FusedPrefill(body).one_layer(zeros, zeros, padding, caches, lambda slot, q, k, v: q.contiguous())


def empty_batch(batch: DecodeBatch, size: int) -> DecodeBatch:
    """`size` padding requests of one token each, in tensors like those of `batch`."""
    table, starts, lengths = batch.table, batch.row_starts, batch.lengths
    return DecodeBatch(
        positions=batch.positions.new_zeros(size),
        write_slots=batch.write_slots.new_full((size,), -1),
        table=table.new_zeros((size, table.stride(0)) if starts is None else (size,)),
        row_starts=None if starts is None else torch.arange(size + 1, dtype=starts.dtype, device=starts.device),
        lengths=None if lengths is None else lengths.new_ones(size),
        page_size=batch.page_size,
        cos_sin=batch.cos_sin,
    )
