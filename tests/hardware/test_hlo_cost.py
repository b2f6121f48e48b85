"""What a compiled program does, counted: against XLA's own counts, and on programs written out."""

# ruff: noqa: E501 - programs as compilers write them

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.hardware.hlo import arrays, parse
from lm.hardware.hlo_cost import program_cost, replica_groups
from tests.refuses import refuses


def mesh(**sizes: int) -> types.SimpleNamespace:
    """Sizes alone: the cost asks nothing else of a mesh."""
    return types.SimpleNamespace(shape=sizes)


def compiled(f, *shapes):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*structs).compile()


def cost(program):
    """Of a program for one device."""
    return program_cost(program.as_text(), mesh(fsdp=1))


def conv(x, w, **options):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=names, **options)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda a, b: a @ b, [(32, 48), (48, 80)]),
        (lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), [(2, 16, 4, 8), (2, 24, 4, 8)]),
        (lambda a, b: conv(a, b, window_strides=(1, 1), padding="SAME"),
         [(2, 12, 10, 3), (3, 5, 3, 8)]),
        (lambda a, b: conv(a, b, window_strides=(2, 1), padding=[(2, 0), (1, 3)],
                           lhs_dilation=(1, 2), rhs_dilation=(2, 1)),
         [(2, 12, 10, 3), (3, 5, 3, 8)]),
        (lambda a, b: conv(a, b, window_strides=(1, 1), padding="VALID", feature_group_count=4),
         [(2, 12, 10, 8), (3, 3, 2, 8)]),
    ],
)  # fmt: skip
def test_products_count_as_xla_counts_them(f, shapes) -> None:
    program = compiled(f, *shapes)
    assert cost(program).matmul_flops == program.cost_analysis()["flops"]


def test_traffic_is_xlas_where_nothing_is_sliced() -> None:
    program = compiled(lambda a, b: jnp.tanh(a @ b) * 2 + 1, (256, 512), (512, 128))
    found = cost(program).hbm_bytes
    assert found == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.05)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    """Twelve products, in loops of three and four: XLA's own count has one."""

    def inner(x, _):
        return jnp.tanh(x @ x), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=4)[0], None

    found = cost(compiled(lambda x: jax.lax.scan(outer, x, None, length=3)[0], (64, 64)))
    assert found.matmul_flops == 12 * 2 * 64**3
    assert sorted(trips for _, _, trips in found.loops) == [3, 4]
    assert {entered for _, entered, _ in found.loops} == {1, 3}


def test_a_loop_of_unknown_length_counts_once_and_is_named() -> None:
    def f(x, n):
        return jax.lax.fori_loop(0, n[0].astype(int), lambda _, y: y @ y, x)

    found = cost(compiled(f, (32, 32), (1,)))
    assert found.matmul_flops == 2 * 32**3
    assert [trips for _, _, trips in found.loops] == [None]


def test_a_conditional_counts_its_largest_branch() -> None:
    def f(i, a, b):
        return jax.lax.cond(i[0] > 0, lambda: a @ a @ a, lambda: (a @ b) @ b.T)

    assert cost(compiled(f, (1,), (64, 64), (64, 8))).matmul_flops == 2 * 2 * 64**3


def test_collectives_of_a_program_on_eight_devices() -> None:
    """Sums and gathers over each axis of a mesh, their bytes worked out by hand."""
    devices = np.array(jax.devices()).reshape(2, 4)
    real = jax.sharding.Mesh(devices, ("data", "fsdp"))
    P = jax.sharding.PartitionSpec

    def body(x):
        total = jax.lax.psum(x, "data")
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        part = jax.lax.psum_scatter(whole, "fsdp", tiled=True)
        return total, whole, part, jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    specs = (P(("data", "fsdp")), P("data"), P(("data", "fsdp")), P(("data", "fsdp")))
    f = jax.shard_map(
        body, mesh=real, in_specs=P(("data", "fsdp")), out_specs=specs, check_vma=False
    )
    program = compiled(f, (64, 128))
    by_op = {c.op: c for c in program_cost(program.as_text(), real).collectives}
    local = 8 * 128 * 4  # bytes of a device
    expected = {
        "all-reduce": (("data",), local, 2 * local / 2),
        "all-gather": (("fsdp",), 4 * local, 3 * local),
        "reduce-scatter": (("fsdp",), 4 * local, 3 * local),
        "collective-permute": (("data",), local, local),
    }
    for op, (axes, payload, wire) in expected.items():
        found = by_op[op]
        assert (found.axes, found.payload_bytes, found.wire_bytes) == (axes, payload, wire), op
        assert (found.count, found.dtype, found.size) == (1, "f32", 2 if axes == ("data",) else 4)


# As libtpu writes them: no trip count but in the condition, and a reduce-scatter as a fusion.
TPU = """
HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.4 (input: bf16[256,128]) -> bf16[128,128] {
  %input = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.82 = bf16[256,128]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add
  %zero = u32[]{:T(128)} constant(0)
  ROOT %slice = bf16[128,128]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.82, %zero, %zero), dynamic_slice_sizes={128,128}
}

%gathered (p: bf16[128,128]) -> bf16[256,128] {
  %p = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}, use_global_device_ids=true
}

%condition (state: (s32[], bf16[256,128])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[256,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (state.1: (s32[], bf16[256,128])) -> (s32[], bf16[256,128]) {
  %state.1 = (s32[]{:T(128)}, bf16[256,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x.1 = bf16[256,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state.1), index=1
  %fusion.1 = bf16[128,128]{1,0:T(8,128)(2,1)} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.4
  %start = ((bf16[128,128]{1,0:T(8,128)(2,1)}, token[]), bf16[256,128]{1,0:T(8,128)(2,1)}) call-start(%fusion.1), async_execution_thread="sparsecore", to_apply=%gathered
  %done = bf16[256,128]{1,0:T(8,128)(2,1)} call-done(%start)
  %kernel.3 = bf16[256,128]{1,0:T(8,128)(2,1)} custom-call(%done), custom_call_target="tpu_custom_call"
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i.1, %one)
  ROOT %both = (s32[]{:T(128)}, bf16[256,128]{1,0:T(8,128)(2,1)}) tuple(%next, %kernel.3)
}

ENTRY %main (p0: bf16[256,128]) -> bf16[256,128] {
  %p0 = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %begin = (s32[]{:T(128)}, bf16[256,128]{1,0:T(8,128)(2,1)}) tuple(%two, %p0)
  %loop = (s32[]{:T(128)}, bf16[256,128]{1,0:T(8,128)(2,1)}) while(%begin), condition=%condition, body=%body
  ROOT %result = bf16[256,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_program_as_libtpu_writes_it() -> None:
    found = program_cost(TPU, mesh(fsdp=2, tensor=2))
    assert found.loops == (("loop", 1, 5),)  # from 2 to below 7
    scatter, gather = sorted(found.collectives, key=lambda c: c.op, reverse=True)
    assert (scatter.op, gather.op) == ("reduce-scatter", "all-gather")
    size = 256 * 128 * 2
    assert (scatter.count, scatter.payload_bytes, scatter.wire_bytes) == (5, 5 * size, 5 * size / 2)
    assert (scatter.axes, scatter.is_async, scatter.num_calls) == (("fsdp",), False, 1)
    # The mesh's partitions are transposed: its second axis is this one's first.
    assert (gather.axes, gather.is_async, gather.payload_bytes) == (("fsdp",), True, 5 * size)
    assert found.custom_calls == {"tpu_custom_call:kernel": 5}
    # Scattered: read whole, written half; gathered: half and whole; the kernel: whole and whole.
    assert found.hbm_bytes == pytest.approx(5 * (1.5 + 1.5 + 2) * size, rel=0.001)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", ()),
        ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
        ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
    ],
)
def test_replica_groups(text, groups) -> None:
    assert replica_groups(text) == groups


def test_types_and_errors() -> None:
    found = arrays("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[5], pred[], /*index=3*/f32[0])")
    assert [(a.dtype, a.dims, a.space, a.bytes) for a in found] == [
        ("bf16", (2, 3), 1, 12), ("s4", (5,), 0, 2.5), ("pred", (), 0, 1), ("f32", (0,), 0, 0),
    ]  # fmt: skip
    refuses(lambda: parse("module @jit_f {}"), "not an HLO module")
    refuses(lambda: replica_groups("rings"), "unknown form")


def test_what_slices_send_each_other_is_counted() -> None:
    """libtpu writes a send and a receive of the host: the second pair here has work between."""
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'

    def named(key: str, kind: str) -> str:
        return (
            f"is_host_transfer=true, frontend_attributes={{{handler},"
            f'_xla_host_transfer_rendezvous="{key}",_xla_megascale_transfer_type="{kind}"}}'
        )

    found = program_cost(
        f"""HloModule m, is_scheduled=true

ENTRY %main (p: bf16[1024]) -> bf16[1024] {{
  %p = bf16[1024]{{0}} parameter(0)
  %a = token[] after-all()
  %s = (bf16[1024]{{0}}, u32[], token[]) send(%p, %a), channel_id=1, {named("x", "ALL_REDUCE")}
  %sd = token[] send-done(%s), channel_id=1, is_host_transfer=true
  %r = (bf16[1024]{{0}}, u32[], token[]) recv(%a), channel_id=2, {named("x", "ALL_REDUCE")}
  %rd = (bf16[1024]{{0}}, token[]) recv-done(%r), channel_id=2, is_host_transfer=true
  %g = bf16[1024]{{0}} get-tuple-element(%rd), index=0
  %s2 = (bf16[1024]{{0}}, u32[], token[]) send(%g, %a), channel_id=3, {named("y", "ALL_GATHER")}
  %r2 = (bf16[4096]{{0}}, u32[], token[]) recv(%a), channel_id=4, {named("y", "ALL_GATHER")}
  %t = bf16[1024]{{0}} tanh(%g)
  %rd2 = (bf16[4096]{{0}}, token[]) recv-done(%r2), channel_id=4, is_host_transfer=true
  %sd2 = token[] send-done(%s2), channel_id=3, is_host_transfer=true
  ROOT %o = bf16[1024]{{0}} add(%t, %g)
}}
""",
        mesh(slice=4, fsdp=2),
    ).collectives
    sent = {(c.op, c.axes, c.size, c.is_async): (c.count, c.payload_bytes) for c in found}
    assert sent == {
        ("all-reduce", ("slice",), 4, False): (1, 2048),
        ("all-gather", ("slice",), 4, True): (1, 4 * 2048),
    }
