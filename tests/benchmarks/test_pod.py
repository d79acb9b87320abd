"""The step compiles for accelerators that aren't there, and its collectives are found."""

import importlib.util
import itertools

import jax
import pytest
from jax import export

from absgd_jax import Sums
from benchmarks import pod
from benchmarks.engine import hlo, steps
from tests.support import commands

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
  %gather = f32[16]{0} all-gather(%c), dimensions={0}
  ROOT %gemm = (f32[16]{0}, s8[0]{0}) custom-call(%gather, %c), custom_call_target="__cublas$gemm"
}
"""


QUICKLY = {"xla_backend_optimization_level": 0}  # which a module's text doesn't depend on


def test_text_of_a_module():
    awaited, other = ("all-reduce", 4, True), ("all-reduce", 8 * 2 + 1 + 2 * 4, False)
    assert hlo.collectives(HLO) == [awaited, other, ("all-gather", 16 * 4, True)]
    assert hlo.launches(HLO) == 6  # two fusions, three collectives, and a call of cuBLAS


@pytest.mark.usefixtures("users_promotion")
class TestStep:
    work = steps.make_work("mlp", 1)

    def prepare(self, form):
        return pod.prepare(self.work, form, steps.make_mesh(jax.devices()[:2]), rows=128)

    @pytest.mark.parametrize("form", steps.FORMS)
    def test_collectives(self, form):
        """On CPUs, too: those of SGD, in which the sums find room, on global arrays or mapped."""
        parameters = sum(p.size for p in jax.tree.leaves(self.work.params))
        # A mask has the number of its examples summed, before the backward pass.
        awaited = int(form == "masked")
        for name, most in ((steps.FORMS[form], 0), (form, Sums().values.size)):
            step, state, batch = self.prepare(name)
            found = hlo.collectives(step.lower(state, batch).compile(QUICKLY).as_text())
            assert len(found) == 1 + awaited
            assert sum(c.awaited for c in found) == awaited
            assert 0 <= sum(c.bytes for c in found) - 4 * (parameters + 1 + awaited) <= 4 * most

    @pytest.mark.parametrize("form", ["absgd", "shard_map", "shard_map_automatic"])
    def test_lowers(self, form):
        step, state, batch = self.prepare(form)
        exported = export.export(step, platforms=["tpu", "cuda"])(state, batch)
        assert exported.platforms == ("tpu", "cuda")
        assert exported.nr_devices == 2
        # Under jit it is the compiler that places them.
        assert ("stablehlo.all_reduce" in exported.mlir_module()) == (form != "absgd")


FORMS = "sgd_shard_map", "shard_map", "shard_map_automatic", "sgd", "absgd", "automatic"


def run(out, topologies):
    """Each result beside that of SGD, and the table."""
    options = ["--models", "mlp", "--topologies", *topologies, "--forms", *FORMS[1:3], *FORMS[4:]]
    done = commands.run("benchmarks.pod", "--out", out, *options)
    assert done.returncode == 0, done.stderr_text
    results, table = commands.load(out), (out / "table.md").read_text()
    assert done.stdout_text.strip() in table
    pairs = itertools.product(topologies, FORMS)
    named = {(topology, form): f"mlp, {topology}, {form}" for topology, form in pairs}
    assert list(results) == list(named.values())
    for (topology, form), name in named.items():
        found = results[name]["collectives"]
        assert [(c["kind"], c["awaited"]) for c in found] == [("all-reduce", False)]
        assert results[name]["devices"] == topologies[topology]
        yield results[name], results[named[topology, steps.FORMS.get(form, form)]], table


# The TPU's compiler comes with the extra "pod".
if importlib.util.find_spec("libtpu"):

    def test_pod(tmp_path):
        for result, sgd, table in run(tmp_path, {"v5e:4x4": 16, "v5e:16x16": 256}):
            if result is not sgd:
                # The scale is a scalar of all gradients, which no update can begin without.
                assert result["memory"] - sgd["memory"] <= 2 * 2**20
                # A product for each parameter, beside the two products for each example.
                assert result["flops"] <= 1.002 * sgd["flops"]
                # Hardly the model's: to this compiler every scalar of the update is 512 bytes.
                assert result["bytes_accessed"] <= 1.02 * sgd["bytes_accessed"]
                assert f"{result['memory'] - sgd['memory']:+,}" in table


# The GPU's compiler comes with the extra "gpu-aot".
if importlib.util.find_spec("jax_cuda12_plugin"):

    def test_gpu(tmp_path):
        for result, sgd, _ in run(tmp_path, {"h100:1x8": 8}):
            assert result["launches"] - sgd["launches"] <= 9
            assert result["memory"] - sgd["memory"] <= 2**20
