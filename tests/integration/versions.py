"""Does this environment's megatron-core take the plugin? `python tests/integration/versions.py` prints OK and exits 0.

Imports, installs, swaps a layer's core attention, uninstalls, and compares every seam with the object it was.
"""

from __future__ import annotations

import sys
import warnings


def main() -> int:
    warnings.simplefilter("ignore")  # Megatron's, about TransformerEngine and Apex
    from megatron_loong.integration import compat, install, uninstall

    megatron = compat.find_megatron()
    seams = compat.seams(megatron)
    before = {name: seam.original() for name, seam in seams.items()}
    install()
    install()
    unhooked = [name for name, seam in seams.items() if seam.original() is before[name]]
    swapped = _swap(megatron)
    uninstall()
    changed = [name for name, seam in seams.items() if seam.original() is not before[name]]
    if unhooked or changed or not swapped:
        print(f"FAILED: not hooked {unhooked}, not restored {changed}, swapped {swapped}")
        return 1
    training = (
        "with megatron.training" if megatron.arguments else f"without megatron.training: {megatron.why_no_arguments}"
    )
    print(f"OK: megatron-core {megatron.version}, Python {sys.version.split()[0]}, {len(seams)} seams, {training}")
    return 0


def _swap(megatron: object) -> bool:
    """Whether the local GPT and MLA specs of this version get our core attention, in a copy of their submodules."""
    import types

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_loong.integration import runtime
    from megatron_loong.integration.core_attention import LoongCoreAttention
    from megatron_loong.integration.spec import swapped_submodules

    config = types.SimpleNamespace(context_parallel_size=2, context_parallel_impl="loong")
    found = []
    for mla in (False, True):
        submodules = get_gpt_layer_local_spec(multi_latent_attention=mla).submodules.self_attention.submodules
        swapped = swapped_submodules(runtime.active(), object(), config, submodules)
        found.append(
            swapped.core_attention is LoongCoreAttention and submodules.core_attention is not LoongCoreAttention
        )
    return all(found)


if __name__ == "__main__":
    sys.exit(main())
