"""`scripts/pretrain_gpt.py` under `--fp8-format` without TransformerEngine; a script for `megatron_runs.train`.

Its checkpoint is played, its matrix products are Megatron's local ones and not in fp8: what is seen is how Megatron's
loop and the plugin go together under fp8, lengths and recomputation.
"""

from __future__ import annotations

import packed_gpt
import te_stand_in

if __name__ == "__main__":
    te_stand_in.plant()
    packed_gpt.run(packed_gpt.base.forward_step)
