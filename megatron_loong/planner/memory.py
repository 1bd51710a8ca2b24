"""Peak bytes of one rank, term by term: a model, a layout and the switches that trade time for memory.

Everything is a sum of named tensors, so that a number can be argued with. Two sets of layer kernels are described:
`local`, Megatron's own layers, whose formulas are held against counted live bytes on a CPU
(tests/integration/test_memory_model.py), and `fused`, TransformerEngine's and the other kernels of a GPU run, which
follow from what those keep for their backward and were not measured. Memory that an allocator wastes, CUDA contexts
and NCCL's own buffers are `reserve_bytes`, outside of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_loong.config import LoongConfig
from megatron_loong.planner.model import ModelShape
from megatron_loong.schedule.parts import waiting_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """One layout and its switches. Sizes as in Megatron; `ValueError` from the constructor names the flag."""

    seq_len: int
    """Of the whole sequence, S."""
    micro_batch_size: int = 1
    context_parallel_size: int = 1
    head_parallel_size: int = 1
    inner_ring_size: int | None = None
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    """Megatron's, inside tensor parallel: norms and residuals are split too."""
    pipeline_parallel_size: int = 1
    expert_parallel_size: int = 1
    micro_batches_in_flight: int | None = None
    """On the first stage; None: as many as there are stages (1F1B)."""
    zero_param_size: int = 1
    """Ranks over which one copy of the parameters is spread."""
    zero_grad_size: int = 1
    zero_optimizer_size: int = 1
    """Ranks over which one copy of master weights and Adam's two moments is spread."""
    dtype_bytes: int = 2
    """Of parameters and activations: 2 for bf16 with float32 master weights, 4 for float32 without."""
    gradient_bytes: int = 4
    """Of one gradient; 2 where gradients are summed in bf16."""
    recompute: bool = True
    """Full recomputation, layer by layer."""
    selective_checkpoint: str = "off"
    """`off`, `ring` (out and lse are kept) or `exchange` (also what the all-to-alls brought)."""
    offload_attention: bool = False
    offload_activations: bool = False
    offload_optimizer: bool = False
    """Master weights and moments in host memory (Megatron's `--optimizer-cpu-offload`)."""
    tiled_loss: int = 0
    """Tokens of one tile; 0: all logits at once."""
    tiled_mlp: int = 0
    """Tiles; 0: all tokens at once."""
    kernels: str = "fused"
    """`fused` or `local`."""

    def __post_init__(self) -> None:
        LoongConfig(self.context_parallel_size, self.head_parallel_size, self.inner_ring_size)
        for name in ("seq_len", "micro_batch_size", "tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, choices in (("selective_checkpoint", ("off", "ring", "exchange")), ("kernels", ("fused", "local"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(choices)}")
        if not self.recompute and (self.selective_checkpoint != "off" or self.offload_activations):
            raise ValueError("--loong-selective-checkpoint and --loong-offload-activations need full recomputation")

    @property
    def tokens(self) -> int:
        """Rows of activations on a rank: tokens of its share of the sequence, times the micro-batch."""
        return self.seq_len * self.micro_batch_size // self.context_parallel_size


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one rank at its peak. `terms` add up to `peak_bytes`."""

    terms: dict[str, int]
    phase: str
    """What the rank is doing at the peak."""
    phases: dict[str, int] = field(default_factory=dict)
    """Working set of every phase that was compared, on top of states and what is kept then."""

    @property
    def peak_bytes(self) -> int:
        """The sum of the terms."""
        return sum(self.terms.values())


def state_bytes(model: ModelShape, plan: MemoryPlan) -> dict[str, int]:
    """Parameters, gradients and optimizer states of a rank (its largest pipeline stage: the first or the last).

    Mixed precision per parameter: 2 bytes of parameter, 4 of gradient, 12 of master weight and Adam's moments. Where
    parameters are spread, two layers of them (or the table) are whole at a time, the one in use and the next; where
    gradients are spread, one layer's are whole until they are reduced.
    """
    dense, experts = _stage_parameters(model, plan)

    def spread(ranks: int) -> int:  # copies of an expert are fewer than those of the rest
        copies = ranks * plan.tensor_parallel_size // plan.expert_parallel_size if ranks > 1 else 1
        return dense // ranks + experts // max(1, copies)

    mixed = plan.dtype_bytes < 4
    optimizer = 0 if plan.offload_optimizer else (12 if mixed else 8)
    expert_params = (model.num_experts or 0) * model.expert_params
    layer = (model.layer_params - expert_params) // plan.tensor_parallel_size
    layer += expert_params // plan.expert_parallel_size
    table = model.embedding_params // plan.tensor_parallel_size
    gathered = max(2 * layer, table) * plan.dtype_bytes if plan.zero_param_size > 1 else 0
    return {
        "parameters": spread(plan.zero_param_size) * plan.dtype_bytes,
        "gathered parameters": gathered,
        "gradients to be reduced": max(layer, table) * plan.gradient_bytes if plan.zero_grad_size > 1 else 0,
        "gradients": spread(plan.zero_grad_size) * plan.gradient_bytes,
        "optimizer states": spread(plan.zero_optimizer_size) * optimizer,
    }


def _stage_parameters(model: ModelShape, plan: MemoryPlan) -> tuple[int, int]:
    """(All but the experts, the experts), which are not cut by TP."""
    layers = math.ceil(model.num_layers / plan.pipeline_parallel_size)
    tables = (2 if plan.pipeline_parallel_size == 1 else 1) * model.embedding_params
    experts = (model.num_experts or 0) * model.expert_params
    split = layers * (model.layer_params - experts) + tables
    dense = split // plan.tensor_parallel_size + (2 * layers + 1) * model.hidden_size
    return dense, layers * experts // plan.expert_parallel_size


@dataclass(frozen=True)
class LayerBytes:
    """Tensors of one layer on a rank, in bytes; see `layer_bytes`."""

    hidden: int
    """One [s, b, hidden] in the activations' dtype."""
    norm: int
    """What one norm keeps for its backward, its output included."""
    residual: int
    """A norm's input, where the norm keeps it and the residual stream does not."""
    rotary: int
    """Copies of the rotary tables in the activations' dtype."""
    q: int
    kv: int
    out: int
    lse: int
    joined: int
    """`out` after the all-to-all back; 0 without head parallelism, where it is `out`."""
    ffn: int
    """One [s, b, ffn]; with tiled MLP of one tile, as are the next two."""
    mlp_kept: int
    """What the MLP keeps for its backward."""
    mlp_backward: int
    """The MLP's largest working set in its backward, `mlp_kept` included."""
    attention_backward: int
    """Largest working set of attention's backward, besides q, kv, out and lse."""

    @property
    def attention_kept(self) -> int:
        """q, kv, out and lse, and the joined output."""
        return self.q + self.kv + self.out + self.lse + self.joined

    @property
    def kept(self) -> int:
        """What a layer that is not recomputed keeps; its input is the layer before's."""
        return 2 * (self.norm + self.residual) + self.rotary + self.attention_kept + self.mlp_kept


def layer_bytes(model: ModelShape, plan: MemoryPlan) -> LayerBytes:
    """The tensors of one layer. q, kv and out have as many elements after the all-to-all as before it."""
    e, rows, tp, hp = plan.dtype_bytes, plan.tokens, plan.tensor_parallel_size, plan.head_parallel_size
    local = plan.kernels == "local"
    norm_rows = rows // tp if plan.sequence_parallel else rows
    hidden = norm_rows * model.hidden_size * e
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_query_groups // tp)
    kv_heads = kv_heads * hp // math.gcd(kv_heads, hp)
    q = rows * heads * model.head_dim * e
    kv = 2 * rows * kv_heads * model.head_dim * e
    mlp_rows = math.ceil(rows / plan.tiled_mlp) if plan.tiled_mlp else rows
    ffn = mlp_rows * (_ffn_width(model) // tp) * e
    wide = 2 if model.gated else 1
    if local:
        # float32 inside the norm: a float32 copy of a narrower input, and the normalized rows before the weight.
        norm = norm_rows * (4 + 4 * model.hidden_size) + hidden + (norm_rows * 4 * model.hidden_size if e < 4 else 0)
        residual = hidden if e >= 4 else 0
        mlp_kept = (wide + (3 if model.gated else 1)) * ffn
        mlp_backward = (wide + 5 if model.gated else wide + 2) * ffn
    else:
        norm, residual = hidden + 4 * norm_rows, hidden
        mlp_kept, mlp_backward = (wide + 1) * ffn, (2 * wide + 1) * ffn
    if model.num_experts:  # a copy of each token for every expert that it visits, on the way there and back
        copies = 2 * model.moe_router_topk * mlp_rows * model.hidden_size * e // tp
        mlp_kept, mlp_backward = mlp_kept + copies, mlp_backward + copies
    if plan.tiled_mlp:  # run again in the backward, from its input, which the norm keeps
        mlp_kept = 0
    return LayerBytes(
        hidden=hidden,
        norm=norm,
        residual=residual,
        rotary=4 * rows // plan.micro_batch_size * model.head_dim * e if local else 0,
        q=q,
        kv=kv,
        out=q,
        lse=rows * heads * max(4, e),
        joined=q if hp > 1 else 0,
        ffn=ffn,
        mlp_kept=mlp_kept,
        mlp_backward=mlp_backward,
        attention_backward=_attention_backward(plan, q, kv),
    )


def _ffn_width(model: ModelShape) -> int:
    """Columns of the MLP that one token meets; with experts, those it is sent to and the shared one, in balance."""
    if not model.num_experts:
        return model.ffn_hidden_size
    routed = model.moe_router_topk * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
    return routed + model.moe_shared_expert_intermediate_size


def _attention_backward(plan: MemoryPlan, q: int, kv: int) -> int:
    """Besides what the forward kept: gradients and travelling blocks.

    The all-to-all of the gradients is no peak: what the forward kept is gone by then, and what is packed goes too.
    """
    wide = 4 // plan.dtype_bytes if plan.dtype_bytes < 4 else 1  # dq and dkv are summed in float32
    # Parts of dq and of dkv, of all rows, that wait before they go into the sum (`attention/merge.py`).
    most = {x: waiting_bytes(x * wide) / x for x in (q, kv)}
    config = LoongConfig(plan.context_parallel_size, plan.head_parallel_size, plan.inner_ring_size)
    dout = q * (2 if plan.head_parallel_size > 1 else 1)
    if config.ring_size == 1:
        return dout + q + kv  # the kernel's gradients are all there is
    is_double = config.outer_ring_size > 1 and (config.inner_ring_size or 1) > 1
    blocks = min(4 if is_double else 2, config.ring_size - 1)
    # Whichever is fewer bytes moves, there with what it needs and home as a gradient.
    there, home = min((kv, kv), (2 * q, q), key=sum)

    def held(parts: float, more: float) -> int:
        """dq and dkv after so many parts of each: what waits (and `more`), and the sum where one was needed."""
        return sum(int(x * (min(parts, most[x] + more) + (wide if parts > most[x] else 0))) for x in (q, kv))

    # In the last step but one, with a tile's gradients, one of which leaves while one arrives; in the end, with dq.
    middle = held(config.ring_size - 0.5, 0.5) + blocks * there + 2 * home + kv // 2
    end = held(config.ring_size + 0.5, 0) + q
    return dout + max(middle, end)


def peak(model: ModelShape, plan: MemoryPlan) -> MemoryReport:
    """The peak of forward and backward: on the first or on the last pipeline stage, whichever needs more.

    (The optimizer's step comes after the activations are gone; its temporaries are not modelled.)
    """
    stages = plan.pipeline_parallel_size
    in_flight = plan.micro_batches_in_flight or stages
    last = _stage_peak(model, plan, in_flight=1, has_loss=True)
    if stages == 1:
        return last
    first = _stage_peak(model, plan, in_flight=in_flight, has_loss=False)
    return max(first, last, key=lambda report: report.peak_bytes)


def _stage_peak(model: ModelShape, plan: MemoryPlan, *, in_flight: int, has_loss: bool) -> MemoryReport:
    layer = layer_bytes(model, plan)
    layers = math.ceil(model.num_layers / plan.pipeline_parallel_size)
    inputs, stash, whole = _kept_per_layer(plan, layer)
    calls = layers * in_flight
    kept = {"layer inputs": inputs * calls, "attention out and lse": stash * calls, "activations": whole * calls}
    # With recomputation it is the first layer's input, and counted there.
    apart = plan.offload_activations or not plan.recompute
    kept["embedding output" if plan.pipeline_parallel_size == 1 else "stage input"] = layer.hidden * apart
    # In a layer's own backward, what it kept is part of the working set, and has been counted there.
    in_layer = _layer_phases(model, plan, layer)
    freed = stash + (whole if not plan.recompute else 0)
    phases = {name: size - freed for name, size in in_layer.items()}
    if has_loss:
        phases |= _loss_phases(model, plan, layer)
    tail = {"pipeline messages": 2 * layer.hidden if plan.pipeline_parallel_size > 1 else 0}
    rows = plan.tokens // plan.micro_batch_size
    tail["tokens and rotary table"] = 8 * (plan.tokens + rows) + 4 * rows * model.head_dim
    phase = max(phases, key=lambda name: phases[name])
    terms = {**state_bytes(model, plan), **kept, phase: phases[phase], **tail}
    return MemoryReport({name: size for name, size in terms.items() if size}, phase, phases)


def _kept_per_layer(plan: MemoryPlan, layer: LayerBytes) -> tuple[int, int, int]:
    """Bytes that wait on the device per layer and micro-batch: checkpointed input, stash, all activations."""
    if not plan.recompute:
        return 0, 0, layer.kept
    stash = 0
    if plan.selective_checkpoint != "off" and not plan.offload_attention:
        stash = layer.out + layer.lse
        if plan.selective_checkpoint == "exchange":
            stash = layer.attention_kept
    return 0 if plan.offload_activations else layer.hidden, stash, 0


def _layer_phases(model: ModelShape, plan: MemoryPlan, layer: LayerBytes) -> dict[str, int]:
    """Working sets of one layer's replay and backward, on top of what other layers keep."""
    attention = layer.norm + layer.rotary + layer.attention_kept
    if not plan.recompute:
        attention += layer.residual
    # The layer's gradient and its output; with offload the input that was fetched and the one that is on its way.
    around = (4 if plan.offload_activations else 2) * layer.hidden
    if plan.offload_attention and plan.selective_checkpoint != "off":
        around += layer.attention_kept if plan.selective_checkpoint == "exchange" else layer.out + layer.lse
    before_mlp = around + attention + layer.norm + layer.residual
    weight = 0 if plan.kernels == "fused" else plan.dtype_bytes * model.hidden_size // plan.tensor_parallel_size
    with_weight = layer.mlp_kept + layer.ffn + weight * _ffn_width(model)
    mlp = before_mlp + max(layer.mlp_backward, with_weight)
    if plan.tiled_mlp:  # the input's gradient, and the weights' summed over tiles in float32
        sums = model.expert_params // plan.tensor_parallel_size * (max(4, plan.dtype_bytes) + plan.dtype_bytes)
        mlp = before_mlp + layer.hidden + layer.mlp_backward + sums
    in_attention = around + layer.hidden + attention - layer.joined + layer.attention_backward
    phases = {"MLP backward": mlp, "attention backward": in_attention}
    if plan.kernels == "local":  # operator by operator: the incoming gradient, and three of the norm's size in float32
        phases["norm backward"] = before_mlp + layer.hidden + 3 * 4 * layer.hidden // plan.dtype_bytes
    return phases


def _loss_phases(model: ModelShape, plan: MemoryPlan, layer: LayerBytes) -> dict[str, int]:
    """Working sets of the language-model head and its loss: float32 logits beside those in the activations' dtype."""
    vocab = model.vocab_size // plan.tensor_parallel_size
    e, norm = plan.dtype_bytes, layer.norm + layer.residual
    table = vocab * model.hidden_size
    wide = vocab * (4 + e if e < 4 else e)
    if plan.tiled_loss:
        rows = min(plan.tiled_loss, plan.tokens)
        made = layer.hidden + 4 * plan.tokens  # hidden's gradient, and an lse per token
        return {"loss": norm + made + tiled_loss_bytes(rows, vocab, model.hidden_size, e)}
    rows = plan.tokens
    gradient = table * e if plan.kernels == "local" else 0
    forward = norm + rows * (wide + 29)
    return {"loss": forward, "head's backward": norm + rows * vocab * e + layer.hidden + gradient}


def tiled_loss_bytes(tile: int, vocab: int, hidden_size: int, dtype_bytes: int) -> int:
    """Working set of the tiled loss, whatever the length of the sequence, for a head of `vocab` rows on this rank.

    Logits of one tile, float32 beside the activations' dtype; the head's gradient, summed in float32; and then,
    without the float32 logits, one tile's part of it.
    """
    table = vocab * hidden_size
    narrow = tile * vocab * dtype_bytes
    logits = narrow + (tile * vocab * 4 if dtype_bytes < 4 else 0)
    return table * max(4, dtype_bytes) + max(logits, narrow + table * dtype_bytes)
