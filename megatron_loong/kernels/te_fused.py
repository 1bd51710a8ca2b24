"""TransformerEngine's fused attention (cuDNN), called as its own context parallelism calls it: lse out, global lse in.

Proven on nothing yet: no GPU was at hand. The tests run the adapter on a CPU against stand-ins with the signatures of
TransformerEngine 2.5 and 2.18, whose numbers come from the reference kernel. The package is imported only when
a request comes that it could serve; nothing else here needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from megatron_loong.config import CAUSAL
from megatron_loong.kernels.common import (
    boundaries_on,
    call_by_name,
    cudnn_fault,
    feature_fault,
    lse_from_bhs,
    lse_to_bhs,
    parameter_names,
    round_up,
    widen,
)
from megatron_loong.kernels.interface import KernelRequest, TileRules
from megatron_loong.kernels.reference import ReferenceKernel

_MODULE = "transformer_engine.pytorch.cpp_extensions.fused_attn"
_LAYOUT = "sbhd_sbhd_sbhd"

# As for torch_cuda: up to 9.15.0 cuDNN is wrong for lengths that are no multiple of 128.
_CUDNN_VERSION = (9, 15, 1)


class TransformerEngineKernel:
    """`AttentionKernel` on `fused_attn_fwd` and `fused_attn_bwd`. Shapes: `interface.AttentionKernel`.

    GQA is native; k and v may differ in width. Reads sequence-first tensors, which is how the ring holds them, so that
    a whole block or half of it is not copied. Sinks are added when all tiles are merged, so its own are not used.
    """

    name = "te_fused"
    bottom_right = False
    proven_on = "nothing yet"
    plans = True
    devices = "CUDA, compute capability 9.x or 10.x, cuDNN 9.15.1 or newer"
    dtypes = "bfloat16, float16"
    head_widths = "up to 128; up to 256 on 9.0; 192 with v 128"
    why_not_fp8 = (
        "cuDNN rounds scores and their gradients by scales of earlier steps, which TransformerEngine keeps for each "
        "layer and takes from all steps of a ring (or in MXFP8 blocks): not written"
    )

    def why_not(self, request: KernelRequest) -> str | None:
        """None when it can serve the request, else the reason. Imports the package only for a request on CUDA."""
        fault = cudnn_fault(request) or feature_fault(request, "softcap", "dropout")
        if fault:
            return fault
        if request.windowed:
            return "its windows want as many keys as queries or more, and not every tile has them"
        if request.deterministic:
            return "its backward is not deterministic on every GPU and cuDNN it takes"
        return self._import_fault()

    def _import_fault(self) -> str | None:
        if importlib.util.find_spec("transformer_engine") is None:
            return "not installed"
        try:
            module = _fused_attn()
            version = importlib.import_module("transformer_engine.pytorch.utils").get_cudnn_version()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # built for another torch or CUDA
            return f"installed but does not import ({(str(error).splitlines() or [type(error).__name__])[0]})"
        if "fake_dtype" not in parameter_names(module.fused_attn_fwd):
            return "this version of transformer_engine is older than 2.0"
        if tuple(version) < _CUDNN_VERSION:
            found, wanted = (".".join(map(str, x)) for x in (version, _CUDNN_VERSION))
            return f"needs cuDNN {wanted} or newer, found {found}"
        return None

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: TileRules
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [b, s_q, h, dv] in q's dtype, lse [b, s_q, h] float32)."""
        if k.shape[1] == 1:  # refused by cuDNN, and one column of scores is nothing
            return ReferenceKernel().forward(q, k, v, rules)
        operands = {name: _operand(x) for name, x in (("q", q), ("k", k), ("v", v))}
        out, auxiliary, *_ = call_by_name(
            _fused_attn().fused_attn_fwd, {"is_training": True, **operands, **_said(q, k, rules)}, {}
        )
        return out.transpose(0, 1)[..., : v.shape[-1]], lse_from_bhs(auxiliary[0].squeeze(-1), q.shape[1])

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        rules: TileRules,
        *,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(dq, dk, dv) of this tile in q's dtype, from `out` and `lse` of the whole row."""
        if deterministic:
            raise NotImplementedError("te_fused refuses deterministic; use --loong-kernel torch_flash")
        if k.shape[1] == 1:
            return ReferenceKernel().backward(dout, q, k, v, out, lse, rules, deterministic=False)
        function = _fused_attn().fused_attn_bwd
        tensors = {"q": q, "k": k, "v": v, "o": out.to(q.dtype), "d_o": dout.to(q.dtype)}
        said: dict[str | tuple[str, ...], Any] = {
            **{name: _operand(x) for name, x in tensors.items()},
            # Behind lse the state of dropout's generator, which is not read without dropout.
            "aux_ctx_tensors": [lse_to_bhs(lse).unsqueeze(-1), torch.zeros(2, dtype=torch.int64, device=q.device)],
            "deterministic": False,
            **_said(q, k, rules),
        }
        if "dqkv_dtype" in parameter_names(function):  # 2.x before it took the inputs' own
            said["dqkv_dtype"] = importlib.import_module("transformer_engine.pytorch.constants").TE_DType[q.dtype]
        if "dqkv_layout" in parameter_names(function):
            said["dqkv_layout"] = _LAYOUT
        dq, dk, dv, *_ = call_by_name(function, said, {})
        dq, dk, dv = (x.transpose(0, 1) for x in (dq, dk, dv))
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]


def _fused_attn() -> ModuleType:
    return importlib.import_module(_MODULE)


def _operand(x: torch.Tensor) -> torch.Tensor:
    """[b, s, h, d] -> dense [s, b, h, d rounded up to 8]: it goes by the shape, whatever the strides say."""
    return widen(x, round_up(x.shape[-1], 8)).transpose(0, 1).contiguous()


def _said(q: torch.Tensor, k: torch.Tensor, rules: TileRules) -> dict[str | tuple[str, ...], Any]:
    """What forward and backward are both told of a tile, in the words of `fused_attn_fwd`."""
    (b, s_q), s_kv = q.shape[:2], k.shape[1]
    causal = rules.window == CAUSAL
    return {
        "max_seqlen_q": s_q,
        "max_seqlen_kv": s_kv,
        "cu_seqlens_q": boundaries_on(q.device, tuple(i * s_q for i in range(b + 1))),
        "cu_seqlens_kv": boundaries_on(q.device, tuple(i * s_kv for i in range(b + 1))),
        "fake_dtype": q.dtype,
        "fused_attention_backend": _fused_attn().FusedAttnBackend["F16_arbitrary_seqlen"],
        "attn_scale": rules.softmax_scale,
        "dropout": 0.0,
        "qkv_layout": _LAYOUT,
        "attn_bias_type": "no_bias",
        "attn_mask_type": "causal" if causal else "no_mask",
        "window_size": (-1, 0) if causal else (-1, -1),
    }
