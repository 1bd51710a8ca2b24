"""Flags, mappings, files and configs say the same; what contradicts is an error that every rank gives alike."""

from __future__ import annotations

import argparse
import functools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_loong.integration import LoongOptions, compat, hooks, install, runtime, uninstall
from megatron_loong.integration.arguments import add_loong_arguments, listen, mend_help
from megatron_loong.integration.checks import check_options
from megatron_loong.integration.options import FIELDS, merge, ranks_per_node, resolve

LOONG = LoongOptions("loong")


@pytest.fixture(autouse=True)
def _uninstalled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MEGATRON_LOONG_PLACED"):
        monkeypatch.delenv(name, raising=False)
    uninstall()
    yield
    uninstall()


@pytest.fixture
def arguments() -> types.ModuleType:
    """Megatron's own argument module, or a skip."""
    megatron = compat.find_megatron()
    if megatron.arguments is None:
        pytest.skip(f"no megatron.training: {megatron.why_no_arguments}")
    return megatron.arguments


#: Enough for Megatron's parser; attention dropout is 0.1 by default, which is refused.
MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 64 --micro-batch-size 1 "
    "--max-position-embeddings 64 --attention-dropout 0"
).split()


def parse(arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str, **environment: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL, *flags.split()])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return arguments.parse_args()


# ---- options ----


def test_flags_have_the_names_and_defaults_of_the_options() -> None:
    parser = argparse.ArgumentParser()
    add_loong_arguments(parser)
    assert LoongOptions(**vars(parser.parse_args([]))) == LoongOptions()
    given = parser.parse_args("--context-parallel-impl loong --loong-head-parallel-size 4".split())
    assert LoongOptions(**vars(given)) == LoongOptions("loong", 4)
    assert given.loong_inner_ring_size == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_parallel_impl": "ulysses"}, "--context-parallel-impl 'ulysses' is unknown; use native or loong"),
        ({"loong_head_parallel_size": 0}, "--loong-head-parallel-size 0 must be a whole number of at least 1, or auto"),
        ({"loong_head_parallel_size": "two"}, "--loong-head-parallel-size 'two' must be a whole number"),
        ({"loong_inner_ring_size": True}, "--loong-inner-ring-size True must be a whole number"),
        ({"loong_placement": "ring_first"}, "--loong-placement: placement='ring_first' is unknown; use head_first"),
    ],
)
def test_a_wrong_value_names_its_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoongOptions(**options)


def test_a_misspelt_key_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no option 'head_parallel'; its options are context_parallel_impl, loong_he"):
        install({"context_parallel_impl": "loong", "head_parallel": 2})
    with pytest.raises(ValueError, match="loong_kernel is given twice"):
        install({"kernel": "auto", "loong_kernel": "auto"})


def test_options_from_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "loong.yaml"
    path.write_text("context_parallel_impl: loong\nhead_parallel_size: 2\nloong-placement: context_first\n")
    install(path)
    assert runtime.active().options() == LoongOptions("loong", 2, loong_placement="context_first")
    path.write_text("- loong\n")
    with pytest.raises(ValueError, match="must hold a mapping of options"):
        install(path)


def test_sources_complete_each_other_and_may_not_contradict() -> None:
    install({"context_parallel_impl": "loong"})
    config = types.SimpleNamespace(loong_head_parallel_size=4)
    assert runtime.active().options(config) == LoongOptions("loong", 4)
    config.context_parallel_impl = "loong"
    assert runtime.active().options(config) == LoongOptions("loong", 4)
    with pytest.raises(ValueError, match=r"is 2 in install\(\) but 4 in the TransformerConfig; give it in one place"):
        install({"context_parallel_impl": "loong", "head_parallel_size": 2})
        runtime.active().options(config)


def test_merging_nothing_is_native() -> None:
    assert merge([]) == LoongOptions()
    assert set(FIELDS) == set(vars(LoongOptions()))


# ---- auto ----


@pytest.mark.parametrize(
    ("cp", "heads", "in_node", "hp", "inner"),
    [
        (8, 32, 8, 8, 1),
        (8, 12, 8, 4, 2),
        (16, 32, 8, 8, 1),
        (16, 12, 8, 4, 2),  # two head groups of four share a node
        (16, 1, 8, 1, 8),
        (4, 3, 4, 1, 4),  # everything in one node: the whole ring is inner
        (6, 8, 6, 2, 3),
        (4, 8, 1, 1, 1),
    ],
)
def test_auto_divides_heads_and_stays_in_the_node(cp: int, heads: int, in_node: int, hp: int, inner: int) -> None:
    config = resolve(LOONG, context_parallel_size=cp, heads=heads, cp_ranks_in_node=in_node)
    assert config is not None
    assert (config.head_parallel_size, config.inner_ring_size) == (hp, inner)


def test_auto_waits_for_the_heads_and_a_number_does_not() -> None:
    assert resolve(LOONG, context_parallel_size=4, heads=None, cp_ranks_in_node=4) is None
    config = resolve(LoongOptions("loong", 2), context_parallel_size=4, heads=None, cp_ranks_in_node=4)
    assert config is not None and config.ring_size == 2


def test_the_launcher_says_how_many_ranks_share_a_node() -> None:
    assert ranks_per_node({"LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS_PER_NODE": "8"}, 1, 16) == 4
    assert ranks_per_node({}, device_count=8, world_size=16) == 8
    assert ranks_per_node({}, device_count=0, world_size=16) == 16


# ---- checks ----

GOOD: dict[str, Any] = {"cp": 4, "tp": 2, "num_attention_heads": 8}


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({}, {"cp": 1}, "needs --context-parallel-size above 1, which is 1"),
        ({"loong_head_parallel_size": 3}, {}, r"head_parallel_size=3 does not divide .*=4; try one of \[1, 2, 4\]"),
        ({"loong_head_parallel_size": 2, "loong_inner_ring_size": 4}, {}, r"inner_ring_size=4 does not divide ring_si"),
        ({"loong_inner_ring_size": 3}, {}, r"inner_ring_size=3 does not divide any ring of 4 ranks"),
        (
            {"loong_head_parallel_size": 4},
            {"num_attention_heads": 6},
            r"size 4 is more than the 3 query heads .*6 .*-size 2\).*these work: \[1, 2\]",
        ),
        ({}, {"num_attention_heads": 7}, "--num-attention-heads 7 is not a multiple of --tensor-model-parallel-size 2"),
        ({}, {"cp_comm_type": ["a2a"]}, "--cp-comm-type a2a .*contradicts --context-parallel-impl loong; remove it"),
        ({}, {"cp_comm_type": "a2a+p2p"}, r"--cp-comm-type a2a\+p2p"),
        ({}, {"hierarchical_context_parallel_sizes": [2, 2]}, "--hierarchical-context-parallel-sizes 2 2"),
    ],
)
def test_contradictions_name_flags_and_numbers(options: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(LoongOptions("loong", **options), **{**GOOD, **changed})
    check_options(LoongOptions(**options), **{**GOOD, **changed})  # native: not ours to judge


def test_megatrons_defaults_do_not_contradict() -> None:
    check_options(LOONG, **GOOD, cp_comm_type=["p2p"], hierarchical_context_parallel_sizes=None)
    check_options(LOONG, **GOOD, cp_comm_type=None)


# ---- Megatron's own parser ----


def test_help_lists_the_flags_whatever_megatrons_own_texts_hold(arguments: types.ModuleType) -> None:
    install()
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
    assert "--loong-head-parallel-size" in parser.format_help()
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", help="such as 5% of all")
    parser.add_argument("--rest", help="the rest (default %(default)s)", default=3)
    mend_help(parser)
    assert "such as 5% of all" in parser.format_help() and "the rest (default 3)" in parser.format_help()


def test_every_parser_of_megatron_has_the_flags_once(
    arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    assert parse(arguments, monkeypatch, "").context_parallel_impl == "native"
    args = parse(arguments, monkeypatch, "--context-parallel-size 4 --context-parallel-impl loong")
    assert runtime.active().options() == LOONG and args.loong_kernel == "auto"
    # A tool that parses once more, with flags of its own.
    monkeypatch.setattr(sys, "argv", ["convert.py", *MODEL, "--mine", "1"])

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--mine")
        return parser

    assert arguments.parse_args(extra_args_provider=provider, ignore_unknown_args=True).mine == "1"
    uninstall()
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL])
    assert not hasattr(arguments.parse_args(), "loong_kernel")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("", ValueError),  # cp 1
        ("--context-parallel-size 4 --loong-head-parallel-size 3", ValueError),
        ("--context-parallel-size 16 --loong-head-parallel-size 16", ValueError),  # 8 heads
        ("--context-parallel-size 4 --loong-placement sideways", ValueError),
        ("--context-parallel-size 4 --seq-length 60 --num-experts 4 --moe-z-loss-coeff 0.001", NotImplementedError),
        ("--context-parallel-size 4 --cp-comm-type a2a", ValueError),
        ("--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2", ValueError),
        ("--context-parallel-size 4 --loong-kernel warp", ValueError),
        ("--context-parallel-size 4 --fp8-format hybrid --transformer-impl local", NotImplementedError),
        ("--context-parallel-size 4 --reset-attention-mask --pipeline-model-parallel-size 2", NotImplementedError),
        ("--context-parallel-size 4 --hybrid-context-parallel", NotImplementedError),  # with Megatron's --eval-iters
        ("--context-parallel-size 4 --hybrid-context-parallel --eval-iters 0 --num-experts 4", NotImplementedError),
    ],
)
def test_a_bad_configuration_says_the_same_on_every_rank_before_anything_starts(
    arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str, error: type[Exception]
) -> None:
    import torch.distributed as dist

    install()
    messages = set()
    for rank in range(4):
        with pytest.raises(error) as raised:
            parse(arguments, monkeypatch, f"--context-parallel-impl loong {flags}", RANK=str(rank), WORLD_SIZE="4")
        messages.add(str(raised.value))
    assert len(messages) == 1
    assert not dist.is_initialized()


@pytest.mark.parametrize("flags", ["--fp8-format hybrid --fp8-recipe tensorwise", "--fp4-format e2m1"])
def test_fp8_and_fp4_are_accepted_where_transformer_engine_is(
    arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    install()
    args = parse(arguments, monkeypatch, f"--context-parallel-impl loong --context-parallel-size 4 {flags}")
    assert args.fp8 == "hybrid" or args.fp4 == "e2m1"


def test_numbers_that_a_checkpoint_will_replace_are_not_judged_yet(
    arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    flags = "--context-parallel-impl loong --context-parallel-size 16 --loong-head-parallel-size 16"
    parse(arguments, monkeypatch, f"{flags} --use-checkpoint-args")
    with pytest.raises(ValueError, match="size 16 is more than the 8 query heads"):
        parse(arguments, monkeypatch, flags)


def test_megatron_is_told_a_length_that_it_would_refuse_under_its_other_name(
    arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    args = parse(arguments, monkeypatch, "--context-parallel-impl loong --context-parallel-size 4 --seq-length 60")
    assert (args.seq_length, args.encoder_seq_length) == (None, 60)
    args = parse(arguments, monkeypatch, "--context-parallel-size 4 --seq-length 60")
    assert (args.seq_length, args.encoder_seq_length) == (60, None)


def test_flags_beside_a_yaml_config_would_be_ignored_and_are_refused() -> None:
    install()
    parser = argparse.ArgumentParser()
    parser.add_argument("--yaml-cfg")
    add_loong_arguments(parser)
    listen(parser, functools.partial(hooks.on_parsed, runtime.active()))
    with pytest.raises(ValueError, match="Megatron ignores flags when --yaml-cfg is given"):
        parser.parse_args("--yaml-cfg model.yaml --context-parallel-impl loong".split())


@pytest.mark.parametrize("ignore", [False, True])
def test_a_misspelt_flag_names_the_nearest_even_where_unknown_words_are_ignored(
    arguments: types.ModuleType, monkeypatch: pytest.MonkeyPatch, ignore: bool
) -> None:
    install()
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *MODEL, "--loong-tiled-los", "64", "--mine"])
    with pytest.raises(ValueError, match="there is no flag --loong-tiled-los; did you mean --loong-tiled-loss?"):
        arguments.parse_args(ignore_unknown_args=ignore)


def test_listening_to_one_parser_leaves_the_others_alone() -> None:
    heard: list[argparse.Namespace] = []
    first, second = argparse.ArgumentParser(), argparse.ArgumentParser()
    listen(first, heard.append)
    second.parse_args([])
    assert heard == []
    namespace = first.parse_args([])
    assert heard == [namespace]
    first.parse_known_args(["--unknown"])
    assert len(heard) == 2
