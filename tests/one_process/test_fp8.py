"""Attention whose forward is in fp8: scales, accuracy, the ring around it, its backward, and who is chosen."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import exact
from benchmarks.gpu import fp8 as gpu_step
from benchmarks.gpu import kernels as gpu_kernels
from benchmarks.gpu.outcome import CannotRunError, Run
from benchmarks.simulate import simulate
from megatron_loong import LoongConfig, attention_2d, shard_sequence
from megatron_loong.comm.groups import LoongGroups
from megatron_loong.config import CAUSAL, FULL
from megatron_loong.kernels import fp8, registry
from megatron_loong.kernels.flash_attn import FlashAttn3Kernel
from megatron_loong.kernels.fp8 import E4M3_MAX, FlashAttn3Fp8Kernel, FlashAttn4Fp8Kernel, Rounded, rounded
from megatron_loong.kernels.interface import TileRules
from megatron_loong.kernels.reference import ReferenceKernel
from megatron_loong.kernels.registry import KERNELS, choose_kernel, explain
from tests.dense import dense_with_gradients
from tests.one_process import fp8_stand_in
from tests.one_process.host_reads import READS
from tests.one_process.test_kernel_packages import flash_attn_4, package
from tests.one_process.test_kernels import CPU, CUDA, flash_attn_3_of_2026, hearsay

BOUND = gpu_step.BOUND
SCALE = 0.125


@pytest.fixture(autouse=True)
def forget():
    yield
    registry.forget_choices()


def tensors(s_q=96, s_kv=96, heads=8, kv_heads=2, width=64, v_width=64, b=2):
    generator = torch.Generator().manual_seed(1)
    sizes = ((b, s_q, heads, width), (b, s_kv, kv_heads, width), (b, s_kv, kv_heads, v_width), (b, s_q, heads, v_width))
    return [torch.randn(x, generator=generator).bfloat16() for x in sizes]


def one_scale_for_all(x: torch.Tensor, kv_heads: int) -> Rounded:
    """The fault to be caught: a scale of the whole tensor."""
    descale = x.abs().amax().float() / E4M3_MAX
    return Rounded((x / descale).to(torch.float8_e4m3fn), descale.expand(x.shape[0], kv_heads))


# -- scales --------------------------------------------------------------------------------------------------------


def test_each_batch_and_kv_head_fills_the_range_of_e4m3() -> None:
    x = tensors()[0] * torch.logspace(-20, 15, 8)[None, None, :, None].bfloat16()
    found = rounded(x, kv_heads=4)
    assert found.values.dtype == torch.float8_e4m3fn and found.descale.shape == (2, 4)
    groups = found.values.float().unflatten(2, (4, 2))
    assert (groups.abs().amax((1, 3, 4)) == E4M3_MAX).all()
    back = found.values.float() * found.descale.repeat_interleave(2, 1)[:, None, :, None]
    larger = slice(1, None, 2)  # of each pair of heads; its neighbour is 1e5 times smaller and rounded to nothing
    error = (back - x.float())[:, :, larger].abs()
    step = found.descale[:, None, :, None] * 2.0**-10  # half of the smallest number's distance to 0
    assert (error <= x.float()[:, :, larger].abs() / 16 + step).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    x = torch.zeros(1, 2, 2, 4)
    assert not rounded(x, 2).values.float().any() and rounded(x, 2).descale.isfinite().all()
    x[0, 1, 1, 2] = torch.inf
    found = rounded(x, 2)
    back = found.values.float() * found.descale[:, None, :, None]
    assert not back[:, :, 0].any() and back[0, 1, 1, 2].isnan()


def relative_rms_by_kv_head(kernel, inputs: list[torch.Tensor], kv_heads: int) -> list[float]:
    q, k, v, _ = inputs
    out, _ = kernel.forward(q, k, v, TileRules(SCALE, CAUSAL))
    right, _ = ReferenceKernel().forward(q.double(), k.double(), v.double(), TileRules(SCALE, CAUSAL))
    by_head = (x.unflatten(2, (kv_heads, -1)).unbind(2) for x in (out, right))
    return [exact.relative_rms(mine, theirs) for mine, theirs in zip(*by_head, strict=True)]


def unequal() -> list[torch.Tensor]:
    """q and k of opposite sizes, so that scores stay of size 1, and v's heads a thousand times one another."""
    q, k, v, dout = tensors(heads=8, kv_heads=4)
    sizes = torch.tensor([1e-6, 1e-3, 1.0, 1e3]).bfloat16()
    return [q * sizes.repeat_interleave(2).view(-1, 1), k / sizes.view(-1, 1), v * sizes.view(-1, 1), dout]


def test_heads_of_very_different_size_are_all_within_the_bound(monkeypatch) -> None:
    kernel = fp8_stand_in.install(monkeypatch)
    assert max(relative_rms_by_kv_head(kernel, unequal(), 4)) <= BOUND


def test_one_scale_for_all_heads_would_be_caught(monkeypatch) -> None:
    kernel = fp8_stand_in.install(monkeypatch)
    monkeypatch.setattr(fp8, "rounded", one_scale_for_all)
    assert max(relative_rms_by_kv_head(kernel, unequal(), 4)) > 0.5


@pytest.mark.parametrize("fault", [0, 1, 2], ids="qkv")
def test_a_scale_that_is_not_handed_on_would_be_caught(fault: int, monkeypatch) -> None:
    kernel = fp8_stand_in.install(monkeypatch)
    operands = FlashAttn3Fp8Kernel._operands

    def forgetful(self: Any, *args: Any) -> Any:
        said = operands(self, *args)
        return {**said, f"{'qkv'[fault]}_descale": torch.ones_like(said[f"{'qkv'[fault]}_descale"])}

    monkeypatch.setattr(FlashAttn3Fp8Kernel, "_operands", forgetful)
    assert max(relative_rms_by_kv_head(kernel, unequal(), 4)) > 0.5


def test_rounding_never_asks_the_device(monkeypatch) -> None:
    kernel, seen = fp8_stand_in.install(monkeypatch), set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Watching():
        kernel._operands(*tensors(width=72, v_width=40)[:3], TileRules(SCALE, CAUSAL))
    assert "aten::linalg_vector_norm" in seen and not seen & READS


# -- tiles, rings, packs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ({}, CAUSAL),
        ({"s_q": 32}, FULL),
        ({"width": 24, "v_width": 40}, CAUSAL),
        ({"heads": 6, "kv_heads": 6, "b": 1}, (9, 0)),
    ],
    ids=["causal", "longer-kv", "odd-widths", "window"],
)
def test_a_tile_is_within_the_bound(shape: dict[str, int], window: tuple[int, int], monkeypatch) -> None:
    kernel, rules = fp8_stand_in.install(monkeypatch), TileRules(SCALE, window)
    q, k, v, dout = tensors(**shape)
    out, lse = kernel.forward(q, k, v, rules)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32 and out.shape == dout.shape
    wide = [x.double() for x in (q, k, v)]
    right = ReferenceKernel().forward(*wide, rules)
    assert exact.relative_rms(out, right[0]) <= BOUND
    assert exact.max_error(lse, right[1]) <= 0.1
    grads = kernel.backward(dout, q, k, v, out, lse, rules, deterministic=True)
    of_float64 = ReferenceKernel().backward(dout.double(), *wide, *right, rules, deterministic=True)
    for mine, theirs in zip(grads, of_float64, strict=True):
        assert exact.relative_rms(mine, theirs) <= BOUND


@pytest.mark.parametrize("config", [LoongConfig(4, 1, 2), LoongConfig(4, 2)], ids=LoongConfig.describe)
def test_a_ring_of_tiles_is_as_accurate_as_one(config: LoongConfig, monkeypatch) -> None:
    """Each tile with scales of its own, merged by lse; then the gradients from the merged out and lse."""
    kernel = fp8_stand_in.install(monkeypatch)
    inputs = tensors(s_q=128, s_kv=128, heads=4, kv_heads=2, b=1)
    right = dense_with_gradients(*(x.double() for x in inputs), True)

    def one_rank(groups: LoongGroups) -> list[torch.Tensor]:
        q, k, v, dout = (shard_sequence(x, groups) for x in inputs)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention_2d(leaves[0], leaves[1], leaves[2], groups, seq_len=128, kernel=kernel)
        wanted = [shard_sequence(right[name], groups) for name in ("out", "dq", "dk", "dv")]
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        return [x for pair in zip(found, wanted, strict=True) for x in pair]

    ranks = simulate(config, one_rank)
    whole = exact.whole(kernel, inputs, True)
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        ring = exact.relative_rms(*(torch.cat([x[2 * i + side] for x in ranks]) for side in (0, 1)))
        assert ring <= 1.2 * exact.relative_rms(whole[name], right[name]) <= BOUND, f"{name}: {ring:.3f}"


def test_packed_documents_are_one_launch_with_the_scales_of_the_tile(monkeypatch) -> None:
    kernel, bounds = fp8_stand_in.install(monkeypatch), (0, 1, 20, 33, 64)
    assert kernel.packs is True
    q, k, v, _ = tensors(s_q=64, s_kv=64, b=1)
    out, _ = kernel.forward(q, k, v, TileRules(SCALE, CAUSAL, boundaries=(bounds, bounds)))
    wide = [x.double() for x in (q, k, v)]
    for start, stop in itertools.pairwise(bounds):
        right, _ = ReferenceKernel().forward(*(x[:, start:stop] for x in wide), TileRules(SCALE, CAUSAL))
        assert exact.relative_rms(out[:, start:stop], right) <= BOUND


def test_backward_is_the_packages_own_in_bfloat16(monkeypatch) -> None:
    kernel, rules = fp8_stand_in.install(monkeypatch), TileRules(SCALE, CAUSAL)
    q, k, v, dout = tensors(width=24, v_width=40)
    out, lse = kernel.forward(q, k, v, rules)
    mine, plain = (x.backward(dout, q, k, v, out, lse, rules, deterministic=True) for x in (kernel, FlashAttn3Kernel()))
    assert all(torch.equal(*pair) for pair in zip(mine, plain, strict=True))


# -- who is chosen ---------------------------------------------------------------------------------------------------


def on_hopper(monkeypatch, **content) -> None:
    fp8_stand_in.install(monkeypatch, **content)
    hearsay(monkeypatch, (9, 0))


def test_fp8_is_chosen_only_when_it_is_asked_for(monkeypatch) -> None:
    on_hopper(monkeypatch)
    assert choose_kernel(CUDA).name == "flash_attn_3"
    assert choose_kernel(CUDA, "auto-fp8") is choose_kernel(CUDA, "flash_attn_3_fp8") is KERNELS["flash_attn_3_fp8"]
    assert "flash_attn_3_fp8: forward in fp8; ask for auto-fp8 or for it by name" in explain(CUDA)


def test_every_other_kernel_says_why_not(monkeypatch) -> None:
    on_hopper(monkeypatch)
    said = dict(line.split(": ", 1) for line in explain(CUDA, "auto-fp8").splitlines())
    assert (said.pop("flash_attn_3_fp8"), said.pop("flash_attn_4_fp8")) == ("taken", "not installed")
    assert "scales of earlier steps" in said.pop("te_fused")
    assert set(said.values()) == {"no forward in fp8"} and len(said) == len(KERNELS) - 3


def test_where_no_kernel_can_the_error_says_what_works() -> None:
    with pytest.raises(ValueError, match=r"auto-fp8.*no kernel serves(.|\n)*flash_attn_3_fp8: needs a CUDA device"):
        choose_kernel(CPU, "auto-fp8")
    with pytest.raises(ValueError, match=r"\(or auto: forward in bfloat16 too\)"):
        choose_kernel(CPU, "auto-fp8")


def test_flash_attn_3_fp8_knows_its_limits(monkeypatch) -> None:
    on_hopper(monkeypatch)
    kernel = FlashAttn3Fp8Kernel()
    assert kernel.why_not(CUDA) is None
    assert "gives bfloat16" in str(kernel.why_not(replace(CUDA, dtype=torch.float16)))
    assert "up to 192" in str(kernel.why_not(replace(CUDA, head_dim=256, value_head_dim=256, deterministic=True)))
    package(monkeypatch, "flash_attn_config", CONFIG={"build_flags": {"FLASHATTENTION_DISABLE_FP8": True}})
    assert "was built without fp8" in str(kernel.why_not(CUDA))
    hearsay(monkeypatch, (10, 0))
    assert "Hopper" in str(kernel.why_not(CUDA))


def test_a_version_without_scales_says_so(monkeypatch) -> None:
    forward, backward = flash_attn_3_of_2026()
    on_hopper(monkeypatch, _flash_attn_forward=forward, _flash_attn_backward=backward)
    assert "takes no scales for fp8" in str(FlashAttn3Fp8Kernel().why_not(CUDA))


def test_blackwell_has_flash_attn_4s(monkeypatch) -> None:
    functions = flash_attn_4()
    forward = functions["_flash_attn_fwd"]

    def _flash_attn_fwd(q, k, v, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, **others):
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
        wide = (x.float() * s[:, None, :, None] for x, s in ((k, k_descale), (v, v_descale)))
        groups = k.shape[2]
        q = (q.float().unflatten(2, (groups, -1)) * q_descale[:, None, :, None, None]).flatten(2, 3)
        out, *rest = forward(q, *wide, softmax_scale=softmax_scale, **others)
        return out.bfloat16(), *rest

    def with_causal(q, k, v, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False,
                    return_lse=False):  # fmt: skip
        return _flash_attn_fwd(
            q, k, v, q_descale, k_descale, v_descale, softmax_scale, causal=causal, return_lse=return_lse
        )

    package(monkeypatch, "flash_attn.cute.interface", **{**functions, "_flash_attn_fwd": with_causal})
    hearsay(monkeypatch, (10, 0))
    kernel = choose_kernel(CUDA, "auto-fp8")
    assert isinstance(kernel, FlashAttn4Fp8Kernel)
    assert max(relative_rms_by_kv_head(kernel, unequal(), 4)) <= BOUND
    hearsay(monkeypatch, (9, 0))
    assert "made for compute capability 10.x" in str(kernel.why_not(CUDA))


# -- the step of the GPU check ---------------------------------------------------------------------------------------


def test_the_gpu_check_runs_fp8_where_it_can_and_finds_a_lost_scale(monkeypatch) -> None:
    kernel, cpu = fp8_stand_in.install(monkeypatch), torch.device("cpu")
    with pytest.raises(CannotRunError, match="needs a CUDA device, the tensors are on cpu"):
        gpu_kernels.check(Run(cpu), "flash_attn_4_fp8")
    monkeypatch.setitem(KERNELS, "flash_attn_3_fp8", kernel)
    run = Run(cpu)
    gpu_kernels.check(run, "flash_attn_3_fp8")
    assert run.failures == {} and set(run.figures["by_keys"]) == {64, 256}
    monkeypatch.setattr(fp8, "rounded", one_scale_for_all)
    run = Run(cpu)
    gpu_kernels.check(run, "flash_attn_3_fp8")
    assert list(run.failures) == ["heads of unequal size"] and "AssertionError: out" in run.figures["reason"]
