"""Programs written by hand, and programs compiled for eight virtual devices, whose loops and
collectives are known."""

import json
import os
import subprocess
import sys

import pytest

from t5x_lite.plan import collectives
from t5x_lite.plan.hlo import arrays_of, parse_module
from t5x_lite.plan.work import Work, work_of

LOOP = """HloModule loop

%body (p: (s32[], f32[4,8], s32[])) -> (s32[], f32[4,8], s32[]) {
  %p = (s32[], f32[4,8]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %limit = s32[] get-tuple-element(%p), index=2
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %all-reduce = f32[4,8]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3}}, to_apply=%add, metadata={op_name="jit(f)/psum"}
  ROOT %out = (s32[], f32[4,8]{1,0}, s32[]) tuple(%next, %all-reduce, %limit)
}

%condition (q: (s32[], f32[4,8], s32[])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] get-tuple-element(%q), index=2
  ROOT %compare = pred[] compare(%j, %end), direction=DIRECTION
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %copied = s32[] copy(%zero)
  %twelve = s32[] constant(END)
  %start = (s32[], f32[4,8]{1,0}, s32[]) tuple(%copied, %a, %twelve)
  %while = (s32[], f32[4,8]{1,0}, s32[]) while(%start), condition=%condition, body=%body
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def _loop(**values: object) -> str:
    text = LOOP
    for name, value in values.items():
        text = text.replace(name, str(value))
    return text


@pytest.mark.parametrize(
    ("start", "step", "end", "direction"),
    [(0, 1, 12, "LT"), (2, 1, 12, "LE"), (0, 5, 12, "LT"), (9, -1, 0, "GT"), (9, -2, 1, "GE")],
)
def test_trip_count_is_that_of_a_python_loop(
    start: int, step: int, end: int, direction: str
) -> None:
    text = _loop(START=start, STEP=step, END=end, DIRECTION=direction)
    last = {"LT": end, "LE": end + 1, "GT": end, "GE": end - 1}[direction]
    work = work_of(text)
    assert list(work.transfers.values()) == [len(range(start, last, step))]
    assert not work.unknown_loops


def test_known_trip_count_is_believed_and_an_unknown_one_reported() -> None:
    text = _loop(START=0, STEP=1, END=12, DIRECTION="LT")
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert list(work_of(known).transfers.values()) == [7]
    unknown = work_of(text.replace("%copied = s32[] copy(%zero)", "%copied = s32[] rng(%zero)"))
    assert unknown.unknown_loops == ["while"]
    assert list(unknown.transfers.values()) == [1]


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("module @jit_f { }")


def test_shapes_with_tiles_and_memory_spaces() -> None:
    shape = "(bf16[64,6]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[], s4[10]{0}, f8e4m3fn[3,3]{1,0})"
    arrays = arrays_of(shape)
    assert [a.num_bytes for a in arrays] == [64 * 6 * 2, 1, 5, 9]
    assert [a.memory_space for a in arrays] == [1, 0, 0, 0]
    assert arrays[0].dims == (64, 6)


# What XLA:TPU makes of an all-gather that overlaps with a loop, and of a reduce-scatter.
TPU = """HloModule tpu, is_scheduled=true

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %s = f32[] add(%l, %r)
}

%start (p0: f32[2,8]) -> (f32[2,8], f32[8,8], u32[]) {
  %p0 = f32[2,8]{1,0} parameter(0)
  %all-gather.1 = f32[8,8]{1,0} all-gather(%p0), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
  ROOT %custom-call = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%step (p1: f32[2,8]) -> f32[8,8] {
  %p1 = f32[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,8]{1,0} all-gather(%p1), channel_id=5, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%all-reduce-scatter (p2: f32[16,8]) -> f32[8,8] {
  %p2 = f32[16,8]{1,0} parameter(0)
  %all-reduce = f32[16,8]{1,0} all-reduce(%p2), channel_id=6, replica_groups=[4,2]<=[8], to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%all-reduce, %id, %zero), dynamic_slice_sizes={8,8}
}

%body (p: (s32[], f32[2,8], f32[8,8])) -> (s32[], f32[2,8], f32[8,8]) {
  %p = (s32[], f32[2,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %shard = f32[2,8]{1,0} get-tuple-element(%p), index=1
  %fusion.step = f32[8,8]{1,0} fusion(%shard), kind=kCustom, calls=%step
  ROOT %out = (s32[], f32[2,8]{1,0}, f32[8,8]{1,0}) tuple(%next, %shard, %fusion.step)
}

%condition (q: (s32[], f32[2,8], f32[8,8])) -> pred[] {
  %q = (s32[], f32[2,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %compare = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (a: f32[2,8], b: f32[16,8]) -> (f32[8,8], f32[2,8]) {
  %a = f32[2,8]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  %begin = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%start
  %shard.0 = f32[2,8]{1,0} get-tuple-element(%begin), index=0
  %whole.0 = f32[8,8]{1,0} get-tuple-element(%begin), index=1
  %zero.0 = s32[] constant(0)
  %tuple.0 = (s32[], f32[2,8]{1,0}, f32[8,8]{1,0}) tuple(%zero.0, %shard.0, %whole.0)
  %while = (s32[], f32[2,8]{1,0}, f32[8,8]{1,0}) while(%tuple.0), condition=%condition, body=%body
  %scattered = f32[8,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter
  %permute-start = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=7, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %permute-done = f32[2,8]{1,0} collective-permute-done(%permute-start)
  ROOT %result = (f32[8,8]{1,0}, f32[2,8]{1,0}) tuple(%scattered, %permute-done)
}
"""  # noqa: E501


def _by_kind(work: Work) -> dict[str, tuple[int, int]]:
    return {t.kind: (count, t.operand_bytes) for t, count in work.transfers.items()}


def test_what_a_tpu_compiler_spreads_over_fusions_counts_once() -> None:
    work = work_of(TPU)
    assert _by_kind(work) == {
        "all-gather": (1, 2 * 8 * 4),
        "reduce-scatter": (1, 16 * 8 * 4),
        "collective-permute": (1, 2 * 8 * 4),
    }
    mesh = {"data": 4, "model": 2}
    for transfer in work.transfers:
        groups = collectives.groups_of(transfer.instruction, 8)
        axes = ("model",) if transfer.kind == "reduce-scatter" else ("data",)
        assert groups.mesh_axes(mesh) == axes
        assert groups.size(mesh) == (2 if transfer.kind == "reduce-scatter" else 4)
        # Slices of four devices: the first half of `data`, and the second.
        assert groups.num_slices([0] * 4 + [1] * 4) == (2 if axes == ("data",) else 1)


# What XLA:TPU makes of sums and a permutation over four slices of two devices, in a loop.
SLICES = """HloModule slices, is_scheduled=true

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %token = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="psum.1_0"}
  %send = (f32[4,8]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3,4}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}, backend_config={"flag_configs":[]}
  %recv = (f32[4,8]{1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3,4}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}, backend_config={"flag_configs":[]}
  %recv-done = (f32[4,8]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %sum = f32[4,8]{1,0} get-tuple-element(%recv-done), index=0
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %sum)
}

%condition (q: (s32[], f32[4,8])) -> pred[] {
  %q = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %three = s32[] constant(3)
  ROOT %compare = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (a: f32[4,8]) -> f32[8,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
  %while = (s32[], f32[4,8]{1,0}) while(%tuple), condition=%condition, body=%body
  %y = f32[4,8]{1,0} get-tuple-element(%while), index=1
  %token.1 = token[] after-all()
  %send.1 = (f32[4,8]{1,0}, u32[], token[]) send(%y, %token.1), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all_gather.3_0",_xla_megascale_target={{100000,300000},{100001,300001},{200000,400000},{200001,400001}},_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.1 = (f32[8,8]{1,0}, u32[], token[]) recv(%token.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target={{100000,300000},{100001,300001},{200000,400000},{200001,400001}},_xla_megascale_transfer_type="ALL_GATHER"}
  %send.2 = (f32[4,8]{1,0}, u32[], token[]) send(%y, %token.1), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_megascale_target={{100000->200000},{200000->100000},{100001->200001},{200001->100001}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  %send.3 = (f32[4,8]{1,0}, u32[], token[]) send(%y, %token.1), channel_id=8, is_host_transfer=true
  %recv-done.1 = (f32[8,8]{1,0}, token[]) recv-done(%recv.1), channel_id=3, is_host_transfer=true
  ROOT %result = f32[8,8]{1,0} get-tuple-element(%recv-done.1), index=0
}
"""  # noqa: E501


def test_what_is_sent_between_slices() -> None:
    """Four slices of two devices, of which JAX's ids tell; the last `send` is to the host."""
    work = work_of(SLICES)
    size = 4 * 8 * 4
    assert _by_kind(work) == {
        "all-reduce": (3, size),
        "all-gather": (1, size),
        "collective-permute": (1, size),
    }
    mesh = {"data": 2, "fsdp": 2, "model": 2}
    ids = [100000, 100001, 200000, 200001, 300000, 300001, 400000, 400001]
    slice_of = [0, 0, 1, 1, 2, 2, 3, 3]
    found = {}
    for transfer in work.transfers:
        groups = collectives.groups_between_slices(transfer.instruction, ids, slice_of)
        found[transfer.kind] = groups.groups.tolist()
        assert groups.num_slices(slice_of) == (4 if transfer.kind == "all-reduce" else 2)
        assert groups.size(mesh) == (4 if transfer.kind == "all-reduce" else 2)
    assert found == {
        "all-reduce": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "all-gather": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "collective-permute": [[0, 2], [2, 0], [1, 3], [3, 1]],
    }


def test_all_reduce_of_which_a_slice_is_used_before_optimization() -> None:
    text = """HloModule partitioned

ENTRY %main (a: f32[16,8], b: s32[]) -> f32[8,8] {
  %a = f32[16,8]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %zero = s32[] constant(0)
  %all-reduce = f32[16,8]{1,0} all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
  %copy = f32[16,8]{1,0} copy(%all-reduce)
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%copy, %b, %zero), dynamic_slice_sizes={8,8}
}
"""
    assert list(_by_kind(work_of(text))) == ["all-reduce"]
    assert list(_by_kind(work_of(text, only_partitioned=True))) == ["reduce-scatter"]


def _groups(text: str, num_devices: int = 8) -> list[list[int]]:
    line = f"  %x = f32[8]{{0}} all-gather(%a), channel_id=1, {text}, dimensions={{0}}"
    module = parse_module("ENTRY %m (a: f32[1]) -> f32[8] {\n" + line + "\n}")
    instruction = module.computations["m"].instructions["x"]
    return collectives.groups_of(instruction, num_devices).groups.tolist()


def test_groups_in_every_form() -> None:
    # The last form names the axes of a mesh; 'x':(2)2 is the second of the halves of x.
    pairs = [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert _groups("replica_groups={{0,4},{1,5},{2,6},{3,7}}") == pairs
    assert _groups("replica_groups=[4,2]<=[2,4]T(1,0)") == pairs
    assert _groups("replica_groups=mesh['x'=2,'y'=4] {'x'}") == pairs
    assert _groups("replica_groups=mesh['x'=2,'y'=1,'z'=4] {'x','y'}") == pairs
    assert _groups("replica_groups=mesh['y'=4,'x'=2], device_ids=([2,4]T(1,0)) {'x'}") == pairs
    assert _groups("replica_groups=mesh['x'=8] {'x':(1)2}") == pairs
    assert _groups("replica_groups=mesh['x'=8] {'x':(2)2}") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert _groups("replica_groups=mesh['x'=8] {'x':(4)2}") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert _groups("replica_groups=mesh['x'=2,'y'=4] {'x','y'}") == [list(range(8))]
    assert _groups("replica_groups={}") == [list(range(8))]


def test_link_bytes_are_those_of_rings_simulated() -> None:
    """What each device sends when n of them pass pieces to their neighbours, n - 1 times."""
    for n in (2, 4, 8):
        piece = 3
        gathered = reduced = 0
        for _ in range(n - 1):
            gathered += piece
            reduced += piece
        assert collectives.link_bytes("all-gather", piece, n) == gathered
        assert collectives.link_bytes("reduce-scatter", n * piece, n) == reduced
        assert collectives.link_bytes("all-reduce", n * piece, n) == reduced + gathered
        assert collectives.link_bytes("all-to-all", n * piece, n) == gathered
        assert collectives.link_bytes("collective-permute", piece, n) == piece
    assert all(collectives.link_bytes(kind, 64, 1) == 0 for kind in collectives.KINDS)


def test_traffic_of_slices_updates_and_memory_on_the_chip() -> None:
    text = """HloModule traffic

%read (p0: f32[10,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
}

%write (p2: f32[10,100], p3: f32[1,100], p4: s32[]) -> f32[10,100] {
  %p2 = f32[10,100]{1,0} parameter(0)
  %p3 = f32[1,100]{1,0} parameter(1)
  %p4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[10,100]{1,0} dynamic-update-slice(%p2, %p3, %p4, %zero.1)
}

ENTRY %main (a: f32[10,100], i: s32[]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,100]{1,0} fusion(%a, %i), kind=kLoop, calls=%read
  %near = f32[1,100]{1,0:S(1)} negate(%row)
  ROOT %new = f32[10,100]{1,0} fusion(%a, %near, %i), kind=kLoop, calls=%write
}
"""
    row, index = 400, 4
    # Read: a row, and written. Negated: read, and kept on the chip. Written: one row.
    assert work_of(text).bytes_accessed == (2 * row + index) + row + (row + index)


def test_traffic_of_a_fusion_in_a_fusion_is_what_the_inner_one_slices() -> None:
    """As XLA:TPU reads a layer of a stack where it is multiplied, and writes one."""
    text = """HloModule nested

%slice (p0: f32[10,100], p1: s32[]) -> f32[100] {
  %p0 = f32[10,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} reshape(%row)
}

%update (p2: f32[10,100], p3: f32[100], p4: s32[]) -> f32[10,100] {
  %p2 = f32[10,100]{1,0} parameter(0)
  %p3 = f32[100]{0} parameter(1)
  %p4 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %new = f32[1,100]{1,0} reshape(%p3)
  ROOT %put = f32[10,100]{1,0} dynamic-update-slice(%p2, %new, %p4, %zero.1)
}

%outer (p5: f32[10,100], p6: f32[10,100], p7: s32[]) -> f32[10,100] {
  %p5 = f32[10,100]{1,0} parameter(0)
  %p6 = f32[10,100]{1,0} parameter(1)
  %p7 = s32[] parameter(2)
  %read = f32[100]{0} fusion(%p5, %p7), kind=kLoop, calls=%slice
  %twice = f32[100]{0} add(%read, %read)
  ROOT %written = f32[10,100]{1,0} fusion(%p6, %twice, %p7), kind=kLoop, calls=%update
}

ENTRY %main (a: f32[10,100], b: f32[10,100], i: s32[]) -> f32[10,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %b = f32[10,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %c = f32[10,100]{1,0} fusion(%a, %b, %i), kind=kOutput, calls=%outer
}
"""
    row, index = 400, 4
    assert work_of(text).bytes_accessed == row + row + index


def test_traffic_is_in_whole_tiles_and_what_is_sent_is_not() -> None:
    """8 x 128 elements a tile; of the second array the first dimension is the minor one."""
    text = """HloModule tiles

ENTRY %main (a: f32[3,100], b: bf16[3,100]) -> bf16[3,100] {
  %a = f32[3,100]{1,0:T(8,128)} parameter(0)
  %b = bf16[3,100]{0,1:T(8,128)(2,1)} parameter(1)
  %c = f32[3,100]{1,0:T(8,128)S(1)} copy(%a)
  %d = bf16[3,100]{0,1:T(8,128)(2,1)S(1)} copy(%b)
  ROOT %e = f32[6,100]{1,0:T(8,128)S(1)} all-gather(%a), channel_id=1, dimensions={0}
}
"""
    work = work_of(text)
    assert work.bytes_accessed == 2 * (8 * 128 * 4) + 128 * 104 * 2
    assert _by_kind(work) == {"all-gather": (1, 3 * 100 * 4)}


START = """HloModule start

%fused (p: f32[2,8]) -> (f32[2,8], f32[8,8], u32[]) {
  %p = f32[2,8]{1,0} parameter(0)
  %all-gather.1 = f32[8,8]{1,0} all-gather(%p), channel_id=1, dimensions={0}
  ROOT %start = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: f32[8,8]) -> f32[8,8] {
  %q = f32[2,8]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,8]{1,0} all-gather(%q), channel_id=1, dimensions={0}
}

ENTRY %main (a: f32[2,8]) -> f32[8,8] {
  %a = f32[2,8]{1,0} parameter(0)
  BODY
}
"""  # noqa: E501
WAYS = {
    "plain": "ROOT %x = f32[8,8]{1,0} all-gather(%a), channel_id=1, dimensions={0}",
    "asynchronous": """%x = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%a), dimensions={0}
  ROOT %y = f32[8,8]{1,0} all-gather-done(%x)""",
    "in fusions": """%x = (f32[2,8]{1,0}, f32[8,8]{1,0}, u32[]) fusion(%a), calls=%fused
  %y = f32[2,8]{1,0} get-tuple-element(%x), index=0
  ROOT %z = f32[8,8]{1,0} fusion(%y), calls=%done""",
}


@pytest.mark.parametrize("way", WAYS)
def test_an_all_gather_reads_and_writes_the_same_however_it_is_done(way: str) -> None:
    text = START.replace("BODY", WAYS[way])
    if way == "plain":  # the channel is that of the start
        text = text.replace("channel_id=1, dimensions={0}\n}", "channel_id=2, dimensions={0}\n}")
    work = work_of(text)
    assert _by_kind(work) == {"all-gather": (1, 2 * 8 * 4)}
    assert work.bytes_accessed == 2 * 8 * 4 + 8 * 8 * 4


def test_a_collective_without_a_channel_hides_no_other() -> None:
    """A start without a channel says nothing of fusions without one."""
    text = START.replace(", channel_id=1", "").replace("BODY", WAYS["in fusions"])
    assert list(work_of(text).transfers.values()) == [1, 1]


COMPILED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from t5x_lite.plan import collectives
from t5x_lite.plan.work import work_of

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
shape = dict(mesh.shape)

def report(function, *arguments):
    text = jax.jit(function).lower(*arguments).compile().as_text()
    work = work_of(text)
    found = []
    for transfer, count in work.transfers.items():
        groups = collectives.groups_of(transfer.instruction, 8)
        found.append([transfer.kind, groups.mesh_axes(shape), groups.size(shape), count,
                      transfer.operand_bytes])
    return {"flops": work.flops, "unknown": work.unknown_loops, "found": sorted(found)}

def abstract(dims, spec):
    return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))

# A product split along `model`, 5 times; in each, a value passed 3 times around `data`.
def local(x, ws):
    def layer(x, w):
        x = jax.lax.psum(x @ w, "model")
        ring = [(i, (i + 1) % 4) for i in range(4)]
        turn = lambda _, y: jnp.tanh(jax.lax.ppermute(y, "data", ring))
        return jax.lax.fori_loop(0, 3, turn, x)[:, :16], None
    return jax.lax.scan(layer, x, ws)[0]

looped = jax.shard_map(local, mesh=mesh, in_specs=(P("data", "model"), P(None, "model", None)),
                       out_specs=P("data", "model"), check_vma=False)
one = report(looped, abstract((8, 32), P("data", "model")),
             abstract((5, 32, 32), P(None, "model", None)))

# Fully sharded parameters of 6 layers: each gathered where it is used.
def fsdp(x, ws):
    def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jnp.tanh(x @ w), None
    return jax.lax.scan(layer, x, ws)[0]

two = report(fsdp, abstract((64, 32), P(("data", "model"), None)),
             abstract((6, 32, 32), P(None, ("data", "model"), None)))
print(json.dumps([one, two]))
"""


def test_compiled_loops_and_collectives() -> None:
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    looped, fsdp = json.loads(done.stdout)
    # On each device x is [2, 16] and w [16, 32]; their product is summed and passed on.
    assert looped["flops"] == 5 * 2 * 2 * 16 * 32
    assert looped["found"] == [
        ["all-reduce", ["model"], 2, 5, 2 * 32 * 4],
        ["collective-permute", ["data"], 4, 15, 2 * 32 * 4],
    ]
    assert fsdp["flops"] == 6 * 2 * (64 // 8) * 32 * 32
    assert fsdp["found"] == [["all-gather", ["data", "model"], 8, 6, 32 * 32 // 8 * 4]]
    assert looped["unknown"] == fsdp["unknown"] == []
