"""`--loong-mla-latent`: multi-latent attention with the latent on the ring trains as with keys and values."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.training")

from megatron_loong import LoongConfig
from megatron_loong.integration import latent
from tests.integration import megatron_runs
from tests.integration.test_packed_runs import packed_script

MLA = (
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 "
    "--v-head-dim 8 --train-iters 3 --context-parallel-impl loong"
).split()


ONE_HEAD_RANK = ("--loong-head-parallel-size", "1")


def train(world_size: int, *flags: str) -> list[megatron_runs.Step]:
    script = megatron_runs.own_script()
    if script is None:
        pytest.skip("needs scripts/pretrain_gpt.py with a megatron.training")
    return megatron_runs.train(script, world_size, *MLA, *flags)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_the_latent_trains_as_keys_and_values_do(tp: int) -> None:
    """8 heads of 8 + 4 and 8 against a latent of 16 + 4: fewer bytes with one head rank."""
    layout = (*ONE_HEAD_RANK, "--tensor-model-parallel-size", str(tp))
    expanded = train(2 * tp, "--context-parallel-size", "2", *layout)
    latent = train(2 * tp, "--context-parallel-size", "2", *layout, "--loong-mla-latent")
    megatron_runs.assert_same_steps(latent, expanded)


def test_the_latent_of_packed_documents_trains_as_keys_and_values_do() -> None:
    """A ring of two, and a double ring of four, of which a rank is sent each document's latent."""
    script = packed_script()
    ring, double = "--context-parallel-size 2", "--context-parallel-size 4 --loong-inner-ring-size 2"
    expanded, on_two, on_four = (
        megatron_runs.train(script, int(layout.split()[1]), *MLA, "--sft", *ONE_HEAD_RANK, *layout.split(), *latent)
        for layout, latent in ((ring, []), (ring, ["--loong-mla-latent"]), (double, ["--loong-mla-latent"]))
    )
    megatron_runs.assert_same_steps(on_two, expanded)
    megatron_runs.assert_same_steps(on_four, expanded)


def test_what_would_lose_its_gradient_is_refused() -> None:
    script = megatron_runs.own_script()
    if script is None:
        pytest.skip("needs scripts/pretrain_gpt.py with a megatron.training")
    with pytest.raises(RuntimeError, match="--recompute-modules mla_up_proj does not work with --loong-mla-latent"):
        train(
            2,
            *"--context-parallel-size 2 --loong-mla-latent --recompute-granularity selective".split(),
            *"--recompute-modules mla_up_proj".split(),
        )


class ToyLayer(torch.nn.Module):
    """What `integration.latent` sees of an MLA layer: 4 heads of 6 + 2 and 5, a latent of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(qk_head_dim=6, qk_pos_emb_head_dim=2, v_head_dim=5, kv_lora_rank=16)
        self.num_attention_heads_per_partition = 4
        self.pg_collection = types.SimpleNamespace(tp=None)
        self.core_attention = types.SimpleNamespace(latent_source=None)
        self.linear_kv_up_proj = torch.nn.Linear(16, 4 * (6 + 5), bias=False)

    def forward(self, compressed: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """The key [s, b, 4, 8]."""
        up = self.linear_kv_up_proj(compressed).unflatten(-1, (4, -1))
        return torch.cat([up[..., :6], rope.unsqueeze(2).expand(-1, -1, 4, -1)], -1)


def test_the_latent_is_taken_where_it_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 elements of a token against 4 x 13 over the head group."""
    monkeypatch.setattr(latent, "copy_to_tensor_model_parallel_region", lambda x, group: x)
    compressed, rope = torch.randn(3, 2, 16), torch.randn(3, 2, 2)
    for config, taken in ((LoongConfig(8, 1), True), (LoongConfig(4, 4), False)):
        layer: Any = ToyLayer()
        latent.attach_before_first_use(layer, config)
        key = layer(compressed, rope)
        source = layer.core_attention.latent_source
        assert (source is not None) == taken
        if taken:
            k, v, weight = source.take(key)
            assert torch.equal(k.squeeze(2), compressed) and torch.equal(v.squeeze(2), rope)
            assert torch.allclose(torch.einsum("sbr,her->sbhe", compressed, weight)[..., :6], key[..., :6], atol=1e-6)
