"""CPU mode: Megatron's own training loop on gloo, without a GPU. The one file that knows how.

For tests, for teaching, and for trying a recipe on a laptop; never for speed. Megatron speaks to `torch.cuda`
directly in a few hundred places. None of them is edited: the names they use are given stand-ins, each with its
reason below. Nothing imports this module but the launcher (`python -m megatron_loong --cpu ...`), and a worker
process that such a run spawned.

Three layers, in the order in which a run meets them:
1. `_stand_in_for_cuda`: functions of `torch.cuda`, and a `TorchFunctionMode` for `device="cuda"` and `.cuda()`;
2. `_stand_in_for_triton`: a package that older Megatron imports without asking whether it is there;
3. `_stand_in_inside_megatron`: what compiles GPU kernels, or draws random numbers to warm them up.

What stays impossible on a CPU, because Megatron's local layers refuse it: tensor parallel with
`--sequence-parallel`, hybrid (Mamba) models, fp8, CUDA graphs, `--use-torch-fsdp2`, and resuming
`--use-distributed-optimizer`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib.util
import multiprocessing.spawn
import os
import runpy
import sys
import time
import types
from collections.abc import Iterator
from typing import Any, ClassVar

#: Inherited by the processes that a CPU-mode run spawns: the script that is their parent's main module.
SCRIPT_VARIABLE = "MEGATRON_LOONG_CPU_SCRIPT"

#: Flags without which Megatron would call a GPU kernel, and the values they take. Only those that the Megatron at
#: hand has, and that the user has not set, are appended.
CPU_FLAGS = (
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),  # TransformerEngine is CUDA only
    ("--use-cpu-initialization",),  # weights drawn whole, then cut: the same for every TP size
    ("--no-gradient-accumulation-fusion",),  # a CUDA extension of Apex
    ("--no-masked-softmax-fusion",),  # CUDA kernels, compiled at start
    ("--no-rope-fusion",),  # TransformerEngine's or Apex's
    ("--no-persist-layer-norm",),  # Apex's; the plain LayerNorm refuses the flag
)


#: What no stand-in covers, and what to use instead.
REFUSED_FLAGS = {"--use-torch-fsdp2": "--use-distributed-optimizer, which shards the optimizer's states"}


def enable(allow_with_gpu: bool = False, argv: list[str] | None = None) -> None:
    """Let Megatron train on the CPU in this process; `argv` (flags only) is extended in place by `CPU_FLAGS`.

    Call it before anything imports Megatron. Raises `ValueError` where a GPU is present, unless `allow_with_gpu`:
    a run that is slower by a factor of a thousand should not start because a flag was forgotten. Also for
    `REFUSED_FLAGS`.
    """
    import torch

    for flag, instead in REFUSED_FLAGS.items():
        if flag in (argv or []):
            raise ValueError(f"{flag} does not work with --cpu; supported there: {instead}")
    if torch.cuda.is_available() and not allow_with_gpu:
        raise ValueError(
            f"--cpu was given, but this machine has {torch.cuda.device_count()} GPU(s); "
            f"leave --cpu out to train on them, or give it twice (--cpu --cpu) to train on the CPU all the same"
        )
    # torch.compile would start a C++ compiler on every rank; Megatron decorates dozens of functions with it. Read
    # when a function is decorated, hence before Megatron is imported.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Megatron asserts this for TP and CP on the GPUs that it believes to see.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _stand_in_for_cuda()
    _lead_children_through_this_module()
    _stand_in_inside_megatron()
    added = _append_missing_flags(argv) if argv is not None else []
    if int(os.environ.get("RANK", "0")) == 0:
        print(
            "megatron_loong CPU mode: torch.cuda calls are mapped to the CPU, collectives need gloo; "
            f"flags added: {' '.join(added) or 'none'}",
            flush=True,
        )


def _append_missing_flags(argv: list[str]) -> list[str]:
    """Append to `argv` what `CPU_FLAGS` lists, the parser knows and the user has not set; return what was added."""
    try:
        arguments = importlib.import_module("megatron.training.arguments")
    except ModuleNotFoundError:
        return []  # no training loop here: the script says so itself
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    arguments.add_megatron_arguments(parser)
    known = parser._option_string_actions  # argparse has no public view of its options
    # By destination, so that --rope-fusion, --no-rope-fusion and --flag=value count as set.
    set_by_user = {known[word.split("=")[0]].dest for word in argv if word.split("=")[0] in known}
    added: list[str] = []
    for flag in CPU_FLAGS:
        if flag[0] in known and known[flag[0]].dest not in set_by_user:
            added += flag
    argv += added
    return added


# ---- 1. torch.cuda -------------------------------------------------------------------------------------------


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for calls that only wait, or that only choose a device."""


class _Event:
    """Remembers when it was recorded, so that Megatron's timers print something true."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.recorded_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.recorded_s = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1000.0 * (end.recorded_s - self.recorded_s)  # milliseconds, as torch.cuda.Event

    def query(self) -> bool:
        return True

    synchronize = wait = _nothing


class _Stream:
    """A CPU has one stream, and everything on it is already done."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    __exit__ = synchronize = wait_event = wait_stream = _nothing


def _stand_in_for_cuda() -> None:
    """Replace what Megatron calls on `torch.cuda`, then map tensors that ask for a GPU to the CPU."""
    import torch
    import torch._dynamo  # tabulates torch.cuda's functions when imported, and rejects stand-ins

    # Never 0: `device_count() > 0` silently gates initialize_model_parallel.
    device_count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    stream, generator = _Stream(), torch.default_generator
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Capability 8.0: bf16 is allowed, fp8 is not.
    properties = types.SimpleNamespace(
        name="CPU", major=8, minor=0, total_memory=memory_bytes, multi_processor_count=os.cpu_count()
    )

    def returns(value: Any) -> Any:
        return lambda *args, **kwargs: value

    stand_ins = {
        # Asserted at start, or asked for where tensors are made. Ints, for some callers do arithmetic on them.
        "is_available": returns(True),
        "device_count": returns(device_count),
        "current_device": returns(int(os.environ.get("LOCAL_RANK", "0"))),
        "set_device": _nothing,
        "device": lambda *args: contextlib.nullcontext(),
        "get_device_properties": returns(properties),
        "get_device_capability": returns((properties.major, properties.minor)),
        "get_device_name": returns(properties.name),
        "is_current_stream_capturing": returns(False),  # torch.optim asks, once is_available() is True
        "synchronize": _nothing,
        "ipc_collect": _nothing,
        "empty_cache": _nothing,
        # Streams and events.
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: stream or _Stream(),
        "current_stream": returns(stream),
        "default_stream": returns(stream),
        "set_stream": _nothing,
        # Random numbers: the CPU's generator is the only one. RNG trackers save and restore it as they would the
        # GPU's; the seed is the same for every CP rank, and the same for CP 1.
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
        "default_generators": [generator] * device_count,
        "_lazy_init": _nothing,
        "_lazy_call": lambda call, **kwargs: call(),  # Megatron wraps its set_rng_state in it
        # Memory reports: zeros rather than a guess.
        "memory_stats": lambda device=None: collections.defaultdict(int),
        "memory_allocated": returns(0),
        "max_memory_allocated": returns(0),
        "memory_reserved": returns(0),
        "max_memory_reserved": returns(0),
        "device_memory_used": returns(0),
        "reset_peak_memory_stats": _nothing,
        "mem_get_info": returns((memory_bytes, memory_bytes)),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    for name in ("manual_seed", "manual_seed_all", "get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, name, stand_ins[name])
    # torch itself asks here (a DataLoader, for pinned memory), and would go on to call the driver.
    torch.accelerator.is_available = returns(False)
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _nothing
    _enter_cpu_tensors_mode()


@functools.cache  # entered once and never left: it must be in force for as long as the process lives
def _enter_cpu_tensors_mode() -> None:
    """Enter a mode under which a tensor that asks for a GPU stays on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    cpu, tensor = torch.device("cpu"), torch.Tensor

    def on_cpu(device: Any) -> Any:
        """The CPU for `"cuda"`, `torch.device("cuda", 1)` and 1; anything else as it is."""
        if isinstance(device, bool) or not isinstance(device, (int, str, torch.device)):
            return device
        is_gpu = isinstance(device, int) or str(device).startswith("cuda")
        return cpu if is_gpu else device

    class CpuTensors(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func is tensor.cuda or func is tensor.pin_memory:
                return args[0]
            if func is tensor.record_stream:
                return None
            if func is tensor.type and len(args) == 1 and not kwargs:
                # Optimizers and gradient clipping compare with the string 'torch.cuda.FloatTensor'.
                return func(*args).replace("torch.", "torch.cuda.")
            if func is tensor.to and len(args) > 1:
                args = (args[0], on_cpu(args[1]), *args[2:])
            if "device" in kwargs:
                kwargs["device"] = on_cpu(kwargs["device"])
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return func(*args, **kwargs)

    CpuTensors().__enter__()
    # A mode is left while the function that it handles runs: inside `torch.autograd.backward`, as a recomputed layer
    # calls it, Megatron's backward functions would ask for a GPU again.
    run_backward = torch.autograd._engine_run_backward

    def run_backward_on_cpu(*args: Any, **kwargs: Any) -> Any:
        with CpuTensors():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_on_cpu


# ---- 2. triton -----------------------------------------------------------------------------------------------


class _Anything(types.ModuleType):
    """A module whose every attribute is a decorator, a type or a submodule, as the reader pleases; none computes."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: args[0] if args and callable(args[0]) else (lambda function: function)


@contextlib.contextmanager
def _stand_in_for_triton() -> Iterator[None]:
    """megatron-core 0.16 imports triton at the top of three modules; torch for CPU comes without it.

    Only while Megatron is imported: torch looks for triton later, and must find that there is none.
    """
    if "triton" in sys.modules or importlib.util.find_spec("triton") is not None:
        yield
        return
    triton, language = _Anything("triton"), _Anything("triton.language")
    triton.language = language  # type: ignore[attr-defined]
    stand_ins = {"triton": triton, "triton.language": language}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]


# ---- 3. Megatron ---------------------------------------------------------------------------------------------


def _stand_in_inside_megatron() -> None:
    """The few functions of Megatron that cannot work here, whatever `torch.cuda` answers."""
    try:
        with _stand_in_for_triton():
            initialize: Any = importlib.import_module("megatron.training.initialize")
    except ModuleNotFoundError:
        return  # megatron-core 0.16 alone has no training loop: the script says so itself
    # Draws random numbers of a shape that depends on the CP size, after seeding: without warm-up a CP 1 and a CP 4
    # run start from the same weights, which is what the comparison of their losses rests on.
    initialize._warmup_jit_function = _nothing
    if hasattr(initialize, "fused_kernels"):  # 0.16
        initialize.fused_kernels.load = _nothing  # asks nvcc for its version
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 without TransformerEngine compares a name it never set
        moe_utils.te_general_gemm = None
    with contextlib.suppress(ModuleNotFoundError):  # before 0.18
        layers: Any = importlib.import_module("megatron.core.tensor_parallel.inference_layers")
        for name in ("InferenceColumnParallelLinear", "InferenceLayerNormColumnParallelLinear"):
            if not isinstance(getattr(layers, name, None), type):  # a mock without TransformerEngine; MTP asks after it
                setattr(layers, name, type(name, (), {}))
    _stand_in_for_images()
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _as_numpy_if_asked


def _stand_in_for_images() -> None:
    """What Megatron's LLaVA and its ViT expect of TransformerEngine."""
    import torch

    llava: Any = importlib.import_module("megatron.core.models.multimodal.llava_model")
    clip: Any = importlib.import_module("megatron.core.models.vision.clip_vit_model")
    local: Any = importlib.import_module("megatron.core.transformer.dot_product_attention")
    norm: Any = importlib.import_module("megatron.core.transformer.torch_norm")
    # Asserted for context parallelism, and these names are asked for nothing else but packs, which the plugin cuts. It
    # takes the place of the attention in either case.
    llava.TEDotProductAttention, llava.HAVE_TE = local.DotProductAttention, True
    llava.is_te_min_version = lambda *args, **kwargs: True
    # Without TransformerEngine the ViT falls back to torch's LayerNorm, which takes other arguments than it gives.
    init = clip.CLIPViTModel.__init__
    init.__defaults__ = tuple(norm.WrappedTorchNorm if x is torch.nn.LayerNorm else x for x in init.__defaults__)


def _as_numpy_if_asked(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's makes numbers for an all-to-all of experts only of tensors that lie on a GPU."""
    return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor


# ---- child processes -----------------------------------------------------------------------------------------


def _lead_children_through_this_module() -> None:
    """Have spawned processes run this module first, which brings the stand-ins, and then the script.

    A spawned process (Megatron's checkpoint writer) imports the parent's main module again. While a script runs,
    that is the script itself, by its path: it would import Megatron without any stand-in. (Python never imports a
    package's `__main__` in a child, so the launcher cannot be the place.)
    """
    original = multiprocessing.spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        data = original(name)
        if "init_main_from_path" in data:
            os.environ[SCRIPT_VARIABLE] = data.pop("init_main_from_path")
            data["init_main_from_name"] = "megatron_loong.integration.cpu_mode"
        return data

    multiprocessing.spawn.get_preparation_data = get_preparation_data


if __name__ == "__mp_main__" and SCRIPT_VARIABLE in os.environ:
    _stand_in_for_cuda()
    _stand_in_inside_megatron()
    _lead_children_through_this_module()
    # What such a process is sent may have been defined in the script.
    globals().update(runpy.run_path(os.environ[SCRIPT_VARIABLE], run_name="__mp_main__"))
