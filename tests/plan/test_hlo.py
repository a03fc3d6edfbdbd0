"""Compares the reader of compiled programs with numbers by hand."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import jaxrl_reason
from jaxrl_reason.plan import hlo


def compiled(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_flops_of_products_follow_from_their_sizes():
    def f(x, w, q, k):
        return x @ w, jnp.einsum("bhqd,bhkd->bhqk", q, k)

    text = compiled(f, (32, 48), (48, 64), (2, 3, 16, 24), (2, 3, 40, 24))
    program = hlo.read(text)
    assert program.flops == 2 * 32 * 48 * 64 + 2 * 2 * 3 * 16 * 40 * 24
    assert program.collectives == {} and program.unknown_loops == {}


def test_the_body_of_a_scan_counts_once_per_trip_and_nested_scans_multiply():
    def f(x, w):
        layer = lambda x, w: (jnp.tanh(x @ w), ())
        twice = lambda x, _: (jax.lax.scan(layer, x, w)[0], ())
        return jax.lax.scan(twice, x, None, length=5)[0]

    assert hlo.read(compiled(f, (32, 64), (7, 64, 64))).flops == 5 * 7 * 2 * 32 * 64 * 64


@pytest.mark.parametrize("remat, passes", [(False, 3), (True, 4)])
def test_the_gradient_of_a_scan_takes_two_products_per_product_and_remat_one_more(remat, passes):
    def f(w, x):
        layer = lambda x, w: (jnp.tanh(jnp.tanh(x @ w)), ())
        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return (jax.lax.scan(layer, x, w)[0] ** 2).sum()

    text = compiled(jax.grad(f), (6, 64, 64), (32, 64))
    assert hlo.read(text).flops == passes * 6 * 2 * 32 * 64 * 64


def test_the_caller_gives_the_trips_of_a_loop_that_depends_on_data():
    def f(x, w):
        going = lambda carry: (carry[0] < 20) & (carry[1].sum() > 0)
        return jax.lax.while_loop(going, lambda carry: (carry[0] + 1, carry[1] @ w), (1, x))

    text, once = compiled(f, (32, 64), (64, 64)), 2 * 32 * 64 * 64
    program = hlo.read(text)
    (name,) = program.unknown_loops
    assert program.unknown_loops == {name: 19}  # t < 20 is the condition, from t = 1 on
    assert program.flops == 19 * once
    assert hlo.read(text, loop_trips=4).flops == hlo.read(text, loop_trips={name: 4}).flops == 4 * once
    with pytest.raises(ValueError, match=f"loop_trips names 'while.none'.*length: {name}"):
        hlo.read(text, loop_trips={"while.none": 4})


def test_a_loop_without_any_limit_counts_once():
    f = lambda x, w: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)
    program = hlo.read(compiled(f, (32, 64), (64, 64)))
    assert list(program.unknown_loops.values()) == [None]
    assert program.flops == 2 * 32 * 64 * 64


def test_branches_of_a_conditional_count_equally_and_an_empty_one_not():
    f = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ w @ w)
    assert hlo.read(compiled(f, (32, 64), (64, 64))).flops == 1.5 * 2 * 32 * 64 * 64
    f = lambda x, w: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x)
    assert hlo.read(compiled(f, (32, 64), (64, 64))).flops == 2 * 32 * 64 * 64


SHARDED = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

mesh = Mesh(np.array(jax.devices()), ("x",))
of = lambda shape, *spec: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

def manual(x):
    def each(x):  # [8, 64] of [64, 64]
        def trip(x, _):
            whole = jax.lax.all_gather(x, "x", tiled=True)
            y = jax.lax.psum_scatter(whole * x.sum(), "x", tiled=True)
            y = jax.lax.all_to_all(y, "x", 1, 0, tiled=True).reshape(8, 64)
            return jax.lax.ppermute(y, "x", [(i, (i + 1) % 8) for i in range(8)]), ()
        x = jax.lax.scan(trip, x, None, length=3)[0]
        return jax.lax.psum(x, "x")
    return jax.shard_map(each, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False)(x)

programs = {
    "gathered": jax.jit(jnp.dot, out_shardings=NamedSharding(mesh, P("x"))).lower(of((64, 32), "x"), of((32, 16), None, "x")),
    "summed": jax.jit(jnp.dot, out_shardings=NamedSharding(mesh, P())).lower(of((64, 32), None, "x"), of((32, 16), "x")),
    "manual": jax.jit(manual).lower(of((64, 64), "x")),
}
for name, lowered in programs.items():
    with open(f"{sys.argv[1]}/{name}.txt", "w") as f:
        f.write(lowered.compile().as_text())
"""


def run_python(script, folder, **environment):
    root = str(pathlib.Path(jaxrl_reason.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path} | environment
    run = subprocess.run([sys.executable, "-c", script, str(folder)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.processes
def test_collectives_of_eight_devices_are_counted_by_kind_and_bytes(tmp_path):
    run_python(SHARDED, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    read = lambda name: hlo.read((tmp_path / f"{name}.txt").read_text())
    gathered, summed, manual = map(read, ("gathered", "summed", "manual"))
    assert gathered.flops == summed.flops == 2 * 64 * 32 * 16 / 8
    assert gathered.collectives == {"all-gather": (1, 4 * 32 * 16)}
    assert summed.collectives == {"all-reduce": (1, 4 * 64 * 16)}
    assert manual.collectives == {
        "all-gather": (3, 3 * 4 * 64 * 64),
        "reduce-scatter": (3, 3 * 4 * 64 * 64),
        "all-to-all": (3, 3 * 4 * 8 * 64),
        "collective-permute": (3, 3 * 4 * 8 * 64),
        "all-reduce": (1, 4 * 8 * 64),
    }


# -- shortened texts of executables for TPUs -------------------------------------------------------

SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%a, %b)
}
"""


def executable(main, more=""):
    return f"HloModule jit_f, is_scheduled=true\n\n{more}\nENTRY %main.1 (p: f32[]) -> f32[] {{\n{main}\n}}\n"


@pytest.mark.parametrize(
    "lhs, rhs, out, attributes, expected",
    [
        ("bf16[128,64]", "bf16[64,32]", "f32[128,32]", "dim_labels=bf_io->bf", 2 * 128 * 64 * 32),
        ("bf16[64,128]", "bf16[64,32]", "f32[128,32]", "dim_labels=fb_io->bf", 2 * 128 * 64 * 32),
        # A batch of [2, 3] products as windows over dilated elements.
        (
            "bf16[2,3,64,16]",
            "bf16[2,3,16,32]",
            "f32[2,3,64,32]",
            "window={size=2x3 stride=1x2 lhs_dilate=2x3}, dim_labels=01bf_01io->01bf",
            2 * 6 * 64 * 16 * 32,
        ),
        # Heads as a window over padding. Each output position meets one kernel position.
        (
            "bf16[8,32,64,1]",
            "bf16[4,16,64,1]",
            "f32[8,32,4,16]",
            "window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 8 * 32 * 64 * 4 * 16,
        ),
        # A convolution with padded borders has 10 * 3 - 2 pairs of a position and a kernel element.
        (
            "f32[4,10,8]",
            "f32[3,8,16]",
            "f32[4,10,16]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            2 * 4 * 28 * 8 * 16,
        ),
        (
            "f32[4,10,8]",
            "f32[3,2,16]",
            "f32[4,10,16]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f, feature_group_count=4",
            2 * 4 * 28 * 2 * 16,
        ),
    ],
)
def test_convolutions_count_neither_padding_nor_holes(lhs, rhs, out, attributes, expected):
    text = executable(f"""
  %p.1 = {lhs}{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %p.2 = {rhs}{{1,0:T(8,128)(2,1)}} parameter(1)
  ROOT %convolution.3 = {out}{{1,0:T(8,128)}} convolution(%p.1, %p.2), {attributes}, operand_precision={{highest,highest}}""")
    assert hlo.read(text).flops == expected


def test_operands_can_include_their_shapes():
    text = executable("""
  %p.1 = f32[4,8]{1,0} parameter(0)
  ROOT %dot.2 = f32[4,4]{1,0} dot(f32[4,8]{1,0} %p.1, f32[4,8]{1,0} %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}""")
    assert hlo.read(text).flops == 2 * 4 * 4 * 8


LOOP = """
%next (p: (s32[], f32[8,8], s32[])) -> s32[] {{
  %p = (s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %step = s32[]{{:T(128)}} constant({step})
  ROOT %add.2 = s32[]{{:T(128)}} add(%i, %step)
}}

%body (p: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {{
  %p = (s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %x = f32[8,8]{{1,0:T(8,128)}} get-tuple-element(%p), index=1
  %limit = s32[] get-tuple-element(%p), index=2
  %next.1 = s32[]{{:T(128)}} fusion(%p), kind=kLoop, calls=%next
  %y = f32[8,8]{{1,0:T(8,128)}} dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %tuple.2 = (s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}, /*index=2*/s32[]) tuple(%next.1, %y, %limit)
}}

%going (p: (s32[], f32[8,8], s32[])) -> pred[] {{
  %p = (s32[]{{:T(128)}}, f32[8,8]{{1,0:T(8,128)}}, s32[]) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %limit = s32[] get-tuple-element(%p), index=2
  ROOT %lt = pred[]{{:T(512)}} compare(%i, %limit), direction={direction}
}}
"""
MAIN = """
  %x = f32[8,8]{{1,0}} parameter(0)
  %start = s32[] constant({start})
  %copy.1 = s32[]{{:T(128)}} copy(%start)
  %limit = s32[] constant({limit})
  %tuple.1 = (s32[], f32[8,8], s32[]) tuple(%copy.1, %x, %limit)
  %while.1 = (s32[], f32[8,8], s32[]) while(%tuple.1), condition=%going, body=%body, metadata={{op_name="jit(f)/while"}}
  ROOT %y = f32[8,8] get-tuple-element(%while.1), index=1"""


@pytest.mark.parametrize(
    "start, step, direction, limit, trips",
    [
        (0, 1, "LT", 7, 7),
        (2, 3, "LT", 12, 4),
        (2, 3, "LE", 11, 4),
        (9, -2, "GT", 0, 5),
        (9, -3, "GE", 0, 4),
        (0, 2, "NE", 6, 3),
        (5, 1, "LT", 5, 0),
        (0, 1, "GT", 7, None),
        (0, 2, "NE", 7, None),
        (0, 1, "EQ", 7, None),
    ],
)
def test_trips_follow_from_start_step_and_limit(start, step, direction, limit, trips):
    text = executable(MAIN.format(start=start, limit=limit), LOOP.format(step=step, direction=direction))
    program = hlo.read(text, loop_trips=11)
    assert program.flops == (11 if trips is None else trips) * 2 * 8 * 8 * 8
    assert program.unknown_loops == ({"while.1": None} if trips is None else {})


def test_a_limit_that_a_trip_changes_is_unknown():
    loop = LOOP.format(step=1, direction="LT").replace("tuple(%next.1, %y, %limit)", "tuple(%next.1, %y, %next.1)")
    assert hlo.read(executable(MAIN.format(start=0, limit=7), loop)).unknown_loops == {"while.1": None}


def test_a_reduction_fused_with_its_slice_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter.1.clone (q: f32[8,32,4,64]) -> f32[32,8,64] {
  %q = f32[8,32,4,64]{3,1,2,0:T(8,128)S(1)} parameter(0)
  %bitcast.1 = f32[128,8,64]{2,1,0:T(8,128)} bitcast(%q)
  %all-reduce.1 = f32[128,8,64]{2,1,0:T(8,128)} all-reduce(%bitcast.1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = f32[32,8,64]{2,1,0:T(8,128)} dynamic-slice(%all-reduce.1, %id, %zero, %zero), dynamic_slice_sizes={32,8,64}
}
"""
    main = """
  %p.1 = f32[8,32,4,64]{3,1,2,0:T(8,128)} parameter(0)
  %all-reduce.2 = f32[8,32,4,64]{3,1,2,0:T(8,128)} all-reduce(%p.1), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %fusion.1 = f32[32,8,64]{2,1,0} fusion(%all-reduce.2), kind=kCustom, calls=%all-reduce-scatter.1.clone"""
    size = 4 * 8 * 32 * 4 * 64
    assert hlo.read(executable(main, SUM + fused)).collectives == {"all-reduce": (1, size), "reduce-scatter": (1, size)}


def test_a_gather_spread_over_fusions_counts_once_and_so_do_async_pairs():
    gather = """
%{name} (p: bf16[64,1024]) -> bf16[256,1024] {{
  %p = bf16[64,1024]{{1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %all-gather.1 = bf16[256,1024] all-gather(%p), channel_id=32, dimensions={{0}}, frontend_attributes={{chain_id="9"}}
}}
"""
    main = """
  %p.1 = bf16[64,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %fusion.1 = bf16[256,1024] fusion(%p.1), kind=kCustom, calls=%begin
  %fusion.2 = bf16[256,1024] fusion(%p.1), kind=kCustom, calls=%middle
  %fusion.3 = bf16[256,1024] fusion(%p.1), kind=kCustom, calls=%end
  %all-gather-start.1 = (bf16[64,1024], bf16[128,1024]) all-gather-start(%p.1), channel_id=33, replica_groups=[2,2]<=[4], dimensions={0}
  %all-gather-done.1 = bf16[128,1024] all-gather-done(%all-gather-start.1)
  %collective-permute-start.1 = (bf16[64,1024], bf16[64,1024], u32[], u32[]) collective-permute-start(%p.1), source_target_pairs={{0,1}}
  %collective-permute-done.1 = bf16[64,1024] collective-permute-done(%collective-permute-start.1)
  %token = token[] after-all()
  %send.1 = (bf16[64,1024], u32[], token[]) send(%p.1, %token), channel_id=4, is_host_transfer=false
  %send-done.1 = token[] send-done(%send.1), channel_id=4
  %recv.1 = (bf16[64,1024], u32[], token[]) recv(%token), channel_id=4
  ROOT %recv-done.1 = (bf16[64,1024], token[]) recv-done(%recv.1), channel_id=4"""
    more = "".join(gather.format(name=name) for name in ("begin", "middle", "end"))
    part = 2 * 64 * 1024
    program = hlo.read(executable(main, more))
    assert program.collectives["all-gather"] == (2, 4 * part + 2 * part)
    assert program.collectives["collective-permute"] == (1, part)
    assert program.collectives["send"] == program.collectives["recv"] == (1, part)


def test_kernels_are_listed_by_name_with_their_shapes():
    kernel = """%y = f32[8,8] custom-call(%x, %limit), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="jit(f)/while/body/splash_mha_fwd/pallas_call" stack_frame_id=10}, backend_config={"custom_call_config":{"body":"TUz="}}
  %other.1 = f32[8,8]{1,0} custom-call(%y), custom_call_target="TopK"
"""
    loop = LOOP.format(step=1, direction="LT")
    (product,) = (line for line in loop.splitlines() if " dot(" in line)
    loop = loop.replace(product, "  " + kernel)
    program = hlo.read(executable(MAIN.format(start=0, limit=6), loop))
    assert program.custom_calls == (
        ("splash_mha_fwd", "tpu_custom_call", ("f32[8,8]", "s32[]"), 6),
        ("TopK", "TopK", ("f32[8,8]",), 6),
    )


def test_a_product_compiled_to_multiplication_and_sum_is_counted_separately():
    fused = """
%scores (q: f32[8,64], k: f32[8,32,64]) -> (f32[8,32], f32[8]) {
  %q = f32[8,64]{1,0} parameter(0)
  %k = f32[8,32,64]{2,1,0} parameter(1)
  %wide = f32[8,32,64]{2,1,0} broadcast(%q), dimensions={0,2}
  %multiply.1 = f32[8,32,64]{2,1,0} multiply(%wide, %k)
  %zero = f32[] constant(0)
  %reduce.1 = f32[8,32]{1,0} reduce(%multiply.1, %zero), dimensions={2}, to_apply=%sum
  %square = f32[8,64]{1,0} multiply(%q, %q)
  %norm = f32[8]{0} reduce(%square, %zero), dimensions={1}, to_apply=%sum
  ROOT %tuple.1 = (f32[8,32], f32[8]) tuple(%reduce.1, %norm)
}
"""
    main = """
  %q.1 = f32[8,64]{1,0} parameter(0)
  %k.1 = f32[8,32,64]{2,1,0} parameter(1)
  ROOT %fusion.1 = (f32[8,32], f32[8]) fusion(%q.1, %k.1), kind=kLoop, calls=%scores"""
    program = hlo.read(executable(main, SUM + fused))
    assert (program.flops, program.reduced_flops) == (0, 2 * 8 * 32 * 64)


def test_a_computation_can_end_with_its_execution_thread():
    text = compiled(lambda x, w: jnp.tanh(x @ w), (32, 48), (48, 64))
    assert text.count("\n}\n") > 1
    assert hlo.read(text.replace("\n}\n", '\n}, execution_thread="sparsecore"\n')) == hlo.read(text)


def test_a_text_that_is_no_executable_raises():
    with pytest.raises(ValueError, match="no ENTRY computation; give the result of jax.stages.Compiled.as_text"):
        hlo.read("module @jit_f { }")
