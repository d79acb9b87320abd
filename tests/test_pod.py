"""The step compiles for accelerators that aren't there, and its collectives are found."""

import importlib.util

import commands
import jax
import pytest
from jax import export
from jax.sharding import AxisType

from benchmarks import pod

HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%multiply (p: bf16[8,4], q: bf16[4]) -> bf16[8] {
  %p = bf16[8,4]{1,0:T(8,128)} parameter(0)
  %q = bf16[4]{0} parameter(1)
  ROOT %dot = bf16[8]{0} dot(%p, %q), lhs_contracting_dims={1}
}

ENTRY %main (x: bf16[8,4], w: bf16[4], c: f32[]) -> f32[] {
  %x = bf16[8,4]{1,0} parameter(0)
  %w = bf16[4]{0} parameter(1)
  %c = f32[] parameter(2)
  %largest = f32[]{:T(128)} all-reduce(%c), to_apply=%add
  %scaled = bf16[4]{0} fusion(%w, %largest), kind=kLoop, calls=%add
  %product = bf16[8]{0:T(8)(2,1)} fusion(%x, %scaled), kind=kOutput, calls=%multiply
  %start = (bf16[8]{0}, pred[], /*index=2*/s32[2]{0}) all-reduce-start(%product, %c, %c)
  %done = (bf16[8]{0}, pred[], s32[2]{0}) all-reduce-done(%start)
  ROOT %gather = f32[16]{0} all-gather(%c), dimensions={0}
}
"""


def test_collectives_of_a_module():
    assert pod.collectives(HLO) == [
        ("all-reduce", 4, True),
        ("all-reduce", 8 * 2 + 1 + 2 * 4, False),
        ("all-gather", 16 * 4, False),
    ]


@pytest.mark.usefixtures("users_promotion")
class TestStep:
    MESH = jax.make_mesh((8,), (pod.AXIS,), axis_types=(AxisType.Auto,))

    @pytest.mark.parametrize(
        ("form", "more", "awaited"),
        [("axis_name", 2, 2), ("pmerge", 1, 0), ("automatic", 2, 0), ("jit", 2, 2)],
    )
    def test_collectives(self, form, more, awaited):
        """On CPUs, too: those of SGD, and those of a few scalars."""
        step, args = pod.make_step("mlp", form, self.MESH, rows=16)
        found = pod.collectives(step.lower(*args).compile().as_text())
        parameters = sum(p.size for p in jax.tree.leaves(args[0]))
        assert 0 <= sum(c.bytes for c in found) - 4 * parameters <= 32
        assert len(found) == 1 + more
        assert sum(c.awaited for c in found) == awaited
        assert not any(c.awaited for c in found if c.bytes > 16)

    @pytest.mark.parametrize("platform", ["tpu", "cuda"])
    @pytest.mark.parametrize("form", ["axis_name", "pmerge", "automatic", "jit"])
    def test_lowers(self, form, platform):
        step, args = pod.make_step("mlp", form, self.MESH, rows=16)
        exported = export.export(step, platforms=[platform])(*args)
        assert exported.platforms == (platform,)
        assert exported.nr_devices == 8
        # Under jit it is the compiler that places them.
        assert ("stablehlo.all_reduce" in exported.mlir_module()) == (form != "jit")


# The TPU's compiler comes with the extra "pod".
if importlib.util.find_spec("libtpu"):

    def test_pod(tmp_path):
        options = ["--models", "mlp", "--topologies", "v5e:4x4", "v5e:16x16"]
        done = commands.run("benchmarks.pod", "--out", tmp_path, *options)
        assert done.returncode == 0, done.stderr_text
        table = (tmp_path / "table.md").read_text()
        assert table in done.stdout_text
        results = commands.load(tmp_path).values()
        assert [(r["devices"], r["step"]) for r in results] == [
            (devices, step) for devices in (16, 256) for step in ("sgd", "axis_name", "pmerge")
        ]
        for sgd, axis_name, pmerge in zip(*[iter(results)] * 3, strict=True):
            assert len(pmerge["collectives"]) == len(sgd["collectives"]) + 1
            assert not any(c["awaited"] for c in sgd["collectives"] + pmerge["collectives"])
            assert sum(c["awaited"] for c in axis_name["collectives"]) == 2
            assert pmerge["memory"] - sgd["memory"] <= 4096
            # Two products a parameter, beside the 128 rows of a device.
            assert pmerge["flops"] / sgd["flops"] < 1.004
            assert f"{pmerge['memory'] - sgd['memory']:+,}" in table
