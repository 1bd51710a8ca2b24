"""What a newcomer gets wrong: each mistake is a `ValueError` that says what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_loong import LoongConfig, attention_2d, build_groups, shard_sequence, token_positions, unshard_sequence

Q = torch.randn(1, 8, 4, 8)
ROW = torch.zeros(4)

ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    r"groups=.* must be the LoongGroups of build_groups\(LoongConfig": [
        {"groups": None}, {"groups": LoongConfig()}, {"groups": "cp"}, {"groups": [0, 1]},
    ],
    r"q must be a tensor; got": [{"q": [[1.0]]}, {"q": None}],
    r"v must be a tensor; got a ndarray": [{"v": np.zeros((1, 8, 4, 8))}],
    r"softmax_offset must be a tensor; got 1.0": [{"softmax_offset": 1.0}],
    r"max_logits must be a tensor": [{"max_logits": True}],
    r"causal=.* must be True or False": [{"causal": None}, {"causal": "full"}, {"causal": 2}],
    r"deterministic='yes' must be True or False": [{"deterministic": "yes"}],
    r"window_size=.* must be None or \(left, right\), such as \(4, 0\)": [
        {"window_size": 4}, {"window_size": (4,)}, {"window_size": (4.0, 0)}, {"window_size": "4,0"},
        {"window_size": (None, 0)},
    ],
    r"window_size=\(-2, 0\): each side must be -1": [{"window_size": (-2, 0)}],
    r"softmax_scale=.* must be None, for .*, or a number above 0": [
        {"softmax_scale": 0}, {"softmax_scale": -0.1}, {"softmax_scale": float("nan")}, {"softmax_scale": "0.1"},
        {"softmax_scale": torch.tensor(0.1)}, {"softmax_scale": True},
    ],
    r"softcap=.* must be a number of at least 0": [
        {"softcap": -1.0}, {"softcap": None}, {"softcap": float("inf")}, {"softcap": "30"},
    ],
    r"dropout_p=.* must be (a number of )?at least 0 and below 1": [
        {"dropout_p": None}, {"dropout_p": "0.1"}, {"dropout_p": -0.1}, {"dropout_p": 1.5},
    ],
    r"dropout_seed=.* must be None or a whole number, the same on every rank": [
        {"dropout_p": 0.1, "dropout_seed": 0.5}, {"dropout_p": 0.1, "dropout_seed": "7"},
        {"dropout_p": 0.1, "dropout_seed": torch.Generator()},
    ],
    r"seq_len='?\d*\.?\d*'? must be a whole number": [{"seq_len": "64"}, {"seq_len": 8.0}, {"kv_seq_len": "8"}],
    r"q of logical rank 0 has 8 tokens; of 64 tokens": [{"seq_len": 64}],
    r"head_parts=.* must be None or a whole number": [{"head_parts": "2"}, {"head_parts": 1.0}],
    r"head_parts=2, but head_parallel_size=1: there is no all-to-all to hide": [{"head_parts": 2}],
    r"head_parts=0, but head_parallel_size=1": [{"head_parts": 0}],
    r"kernel=None must be the name of a kernel": [{"kernel": None}],
    r"kernel='flash' is unknown; use auto": [{"kernel": "flash"}],
    r"gradient_wire=None is unknown": [{"gradient_wire": None}],
    r"qkv_format='hsbd' is unknown": [{"qkv_format": "hsbd"}, ],
    r"cu_seqlens must be one row of whole numbers": [
        {"cu_seqlens": torch.tensor([[0, 8]])}, {"cu_seqlens": torch.tensor([0.0, 8.0])}, {"cu_seqlens": 8},
        {"cu_seqlens": "0,8"}, {"cu_seqlens": np.array([0.5, 8])},
    ],
    r"cu_seqlens ends at 4, but .* one rank's own tokens, .* padding, .* append 8": [
        {"cu_seqlens": [0, 4]}, {"cu_seqlens": [0, 4], "seq_len": 8},
    ],
    r"cu_seqlens_kv ends at 4": [{"cu_seqlens": [0, 8], "cu_seqlens_kv": [0, 4]}],
    r"cu_seqlens has 1 documents of queries, cu_seqlens_kv has 2 of keys": [
        {"cu_seqlens": [0, 8], "cu_seqlens_kv": [0, 4, 8]}, {"cu_seqlens_kv": [0, 4, 8]},
    ],
    r"q, k and v must have four dimensions": [{"q": Q[0]}, {"q": Q[..., 0]}],
    r"q, k and v must share one dtype and device": [{"q": Q.double()}],
    r"takes .*, not int64|no kernel serves": [{"q": Q.long(), "k": Q.long(), "v": Q.long()}],
}  # fmt: skip


#: Calls after which arguments that may change from call to call make no new kind of call.
RIGHT: list[dict[str, Any]] = [
    {},
    {"seq_len": 8, "cu_seqlens": [0, 8]},
    {"dropout_p": 0.1, "dropout_seed": 1},
    {"max_logits": ROW.clone()},
    {"softmax_offset": ROW},
]


@pytest.mark.parametrize("after_right_calls", [False, True])
@pytest.mark.parametrize("message", ARGUMENTS, ids=lambda message: message[:40])
def test_a_wrong_argument_of_attention_2d(message: str, after_right_calls: bool) -> None:
    for mistake in ARGUMENTS[message]:
        groups = build_groups(LoongConfig(), [0])
        for right in RIGHT if after_right_calls else ():
            attention_2d(Q, Q, Q, groups, **right)
        call = {"q": Q, "k": Q, "v": Q, "groups": groups, **mistake}
        for _ in range(2):  # a mistake is none the less one the second time
            with pytest.raises(ValueError, match=message):
                attention_2d(**call)


def test_numbers_of_other_libraries_are_numbers() -> None:
    groups = build_groups(LoongConfig(), [0])
    plain = attention_2d(Q, Q, Q, groups, softmax_scale=0.5, window_size=(3, 0), seq_len=8, cu_seqlens=[0, 3, 8])
    found = attention_2d(
        Q, Q, Q, groups, softmax_scale=np.float32(0.5), window_size=[np.int64(3), 0], seq_len=np.int64(8),
        cu_seqlens=np.array([0, 3, 8]), causal=1,
    )  # type: ignore[arg-type]  # fmt: skip
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    ("config", "ranks", "options", "message"),
    [
        (LoongConfig(4), range(4), {}, "call torch.distributed.init_process_group before build_groups"),
        ({"context_parallel_size": 1}, [0], {}, "is no LoongConfig; use LoongConfig"),
        (4, [0], {}, "is no LoongConfig"),
        (LoongConfig(), 0, {}, r"cp_global_ranks=0 must be the global ranks of the group, such as range\(8\)"),
        (LoongConfig(), [0.0], {}, "must be the global ranks of the group"),
        (LoongConfig(), None, {}, "must be the global ranks of the group"),
        (LoongConfig(), [0], {"timeout": 30}, "timeout=30 must be a datetime.timedelta"),
    ],
)
def test_a_wrong_argument_of_build_groups(config: Any, ranks: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_groups(config, ranks, **options)


def test_wrong_arguments_of_what_shares_out() -> None:
    groups = build_groups(LoongConfig(), [0])
    for function in (shard_sequence, unshard_sequence):
        with pytest.raises(ValueError, match="groups=.* must be the LoongGroups"):
            function(Q, LoongConfig())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"x.* must be a tensor; got a list"):
            function([1, 2], groups)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config=.* must be a LoongConfig"):
        token_positions(groups, 0, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cp_rank='0' must be a whole number"):
        token_positions(LoongConfig(), "0", 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dim=3 .* 3 dimensions"):
        shard_sequence(Q[0], groups, 3)


@pytest.mark.parametrize(
    "options", [{"placement": None}, {"placement": ["head"]}, {"sequence_layout": None}, {"head_parallel_size": "2"}]
)
def test_a_wrong_field_of_the_config(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*(is unknown; use|must be a whole number)"):
        LoongConfig(**options)
