"""`torch.compile` around the attention: one graph, the numbers of the call that is not compiled. One rank."""

from __future__ import annotations

import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups
from megatron_loong.comm.groups import groups_by_number


def qkv(length=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, length, n, d, generator=generator, dtype=dtype).requires_grad_()
        for n, d in ((4, 8), (2, 8), (2, 6))
    ]


@pytest.fixture(scope="module")
def groups():
    return build_groups(LoongConfig(1), [0])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs_and(function):
    """`function` compiled in one graph, and the graphs that were made."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    return graphs, torch.compile(function, fullgraph=True, backend=keep)


PACKS = [
    {"cu_seqlens": [0, 5, 16]},
    {"cu_seqlens": torch.tensor([0, 5, 16], dtype=torch.int32), "window_size": (3, 0)},
]


@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"window_size": (3, 0)}, {"softmax_scale": 0.3}, *PACKS], ids=str
)
@pytest.mark.parametrize("qkv_format", ["bshd", "sbhd"])
def test_a_layer_is_one_graph_with_one_attention_in_it(qkv_format, options, groups):
    q, k, v = (x if qkv_format == "bshd" else x.detach().transpose(0, 1).requires_grad_() for x in qkv())
    sink = torch.arange(4.0, dtype=torch.float64).requires_grad_()

    def layer(q, k, v, sink):
        return torch.sin(3 * attention_2d(2 * q, k, v, groups, qkv_format=qkv_format, softmax_offset=sink, **options))

    want = layer(q, k, v, sink)
    right = torch.autograd.grad(want, (q, k, v, sink), torch.ones_like(want))
    graphs, compiled = graphs_and(layer)
    out = compiled(q, k, v, sink)
    got = torch.autograd.grad(out, (q, k, v, sink), torch.ones_like(out))
    for name, x, y in zip(("out", "dq", "dk", "dv", "dsink"), (out, *got), (want, *right), strict=True):
        assert (x - y).abs().max() <= 1e-12, name
    (graph,) = graphs
    operators = [str(node.target) for node in graph.graph.nodes if "loong" in str(node.target)]
    assert operators == ["megatron_loong.attention_2d"]


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 16]], ids=["one-document", "packed"])
def test_forward_and_backward_are_traced_with_fake_tensors(groups, cu_seqlens):
    """Through AOT autograd, as inductor does it: shapes, strides and the backward operator."""
    q, k, v = qkv()

    def layer(q, k, v):
        return attention_2d(q, k, v, groups, cu_seqlens=cu_seqlens).square()

    want = layer(q, k, v)
    right = torch.autograd.grad(want, (q, k, v), torch.ones_like(want))
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for name, x, y in zip(("out", "dq", "dk", "dv"), (out, *got), (want, *right), strict=True):
        assert (x - y).abs().max() <= 1e-12, name


def test_packs_of_other_documents_take_the_same_graph(groups):
    graphs, compiled = graphs_and(lambda q, k, v, begins: attention_2d(q, k, v, groups, cu_seqlens=begins))
    q, k, v = qkv()
    for boundaries in ([0, 3, 7, 16], [0, 1, 12, 16]):
        begins = torch.tensor(boundaries)
        assert torch.equal(compiled(q, k, v, begins), attention_2d(q, k, v, groups, cu_seqlens=begins))
    assert len(graphs) == 1


@pytest.mark.parametrize("cu_seqlens", [None, torch.tensor([0, 5, 16])], ids=["one-document", "packed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operators_keep_torchs_rules(dtype, cu_seqlens, groups):
    q, k, v = (x.detach().transpose(0, 1).requires_grad_() for x in qkv(dtype=dtype))
    arguments = (q, k, v, None, cu_seqlens, groups.number, "auto auto", [True, -1, -1, 0.3, 0.0, False], 16, -1)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.megatron_loong.attention_2d.default, arguments, test_utils=tests)


def test_windows_and_scales_that_change_stay_in_the_graph(groups):
    """Numbers that the compiler holds to be variable."""
    q, k, v = qkv()

    def layer(left, scale):
        return attention_2d(q, k, v, groups, window_size=(left, 0), softmax_scale=scale).cos()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for left, scale in ((3, 0.3), (4, 0.4), (5, 0.5)):
        assert torch.equal(compiled(left, scale), layer(left, scale)), (left, scale)


def test_another_length_is_another_graph(groups):
    graphs, compiled = graphs_and(lambda *x: attention_2d(*x, groups))
    for length in (16, 24, 40):
        q, k, v = qkv(length)
        assert torch.equal(compiled(q, k, v), attention_2d(q, k, v, groups))
    assert len(graphs) == 3


def test_what_a_graph_cannot_hold_breaks_it_and_is_done_right(groups):
    q, k, v = qkv()
    options = {"cu_seqlens": [0, 5, 16], "cu_seqlens_kv": [0, 5, 16], "dropout_p": 0.0}
    want = attention_2d(q, k, v, groups, **options)
    assert torch.equal(torch.compile(lambda *x: attention_2d(*x, groups, **options), backend="eager")(q, k, v), want)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda *x: attention_2d(*x, groups, **options), backend="eager", fullgraph=True)(q, k, v)


def test_without_gradients_nothing_else_changes(groups):
    q, k, v = qkv()
    with torch.no_grad():
        compiled = torch.compile(lambda *x: attention_2d(*x, groups), backend="eager", fullgraph=True)
        assert torch.equal(compiled(q, k, v), attention_2d(q, k, v, groups))


def test_groups_are_found_while_somebody_holds_them():
    groups = build_groups(LoongConfig(1), [0])
    number = groups.number
    assert groups_by_number(number) is groups
    del groups
    with pytest.raises(RuntimeError, match=f"LoongGroups number {number} are gone"):
        groups_by_number(number)
