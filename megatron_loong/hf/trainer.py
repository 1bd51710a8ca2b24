"""`with_loong(Trainer)`: a Trainer of transformers, or TRL's SFTTrainer, in which groups of ranks share each sample.

Two seams carry it: data loaders that are shared out to groups instead of ranks, and a collator that keeps this rank's
tokens before the Trainer counts labels. The Trainer's own arithmetic is then right as it is: it sums the count over
all ranks, multiplies the loss by their number, and its wrapper averages gradients over them.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_loong.comm.groups import LoongGroups
from megatron_loong.comm.sequence import gathered
from megatron_loong.config import LoongConfig
from megatron_loong.hf.checks import check_arguments, check_trainer_class
from megatron_loong.hf.data import ShardCollator
from megatron_loong.hf.loss import NO_LABEL
from megatron_loong.hf.model import build_groups_of_world, parallelize


def with_loong(trainer_class: type) -> type:
    """A subclass of a Trainer class that trains on sequences cut over the ranks of a group.

        trainer = with_loong(SFTTrainer)(model=model, args=args, train_dataset=dataset, loong=LoongConfig(4, 2))

    `loong` says how many consecutive ranks share a sample; per_device_train_batch_size is then what one group of them
    takes at a time. `tiled_loss`, `tiled_mlp`, `selective_checkpoint`, `offload` and `kernel` are those of
    `parallelize`. The rest is the Trainer's. `NotImplementedError` for classes that cut sequences themselves.
    """
    check_trainer_class(trainer_class)
    # TRL's functions over a dataset hold the trainer, and datasets pickles them: the class must be found by its name.
    name = f"Loong{trainer_class.__name__}_{trainer_class.__module__}".replace(".", "_")
    bases = (_LoongTrainer, trainer_class)
    if getattr(globals().get(name), "__bases__", None) != bases:
        globals()[name] = type(name, bases, {"__doc__": trainer_class.__doc__, "__module__": __name__})
    return globals()[name]


class _LoongTrainer:
    """What stands before the Trainer class in the subclass that `with_loong` makes."""

    accelerator: Any
    args: Any
    data_collator: Any
    gather_function: Any
    model: Any
    model_accepts_loss_kwargs: bool

    def __init__(self, *args: Any, loong: LoongConfig, **kwargs: Any) -> None:
        names = ("tiled_loss", "tiled_mlp", "selective_checkpoint", "offload", "kernel")
        self._loong_options = {name: kwargs.pop(name) for name in names if name in kwargs}
        self._loong_config = loong
        self._loong_groups: LoongGroups | None = None
        super().__init__(*args, **kwargs)
        check_arguments(self)
        assert self._loong_groups is not None
        self.data_collator = ShardCollator(self.data_collator, loong, self._loong_groups.require_cp_rank())
        self.model_accepts_loss_kwargs = True  # the loss that parallelize sets takes the count
        parallelize(self.model, self._loong_groups, **self._loong_options)

    def call_model_init(self, trial: Any = None) -> Any:
        """A model that is made anew for a trial is parallelized anew; the first is seen to by __init__."""
        model = super().call_model_init(trial)  # type: ignore[misc]
        if isinstance(getattr(self, "data_collator", None), ShardCollator):
            assert self._loong_groups is not None
            parallelize(model, self._loong_groups, **self._loong_options)
        return model

    def create_accelerator_and_postprocess(self) -> None:
        """Here the process group is first there: make the groups, and share data out to them."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self._loong_groups = build_groups_of_world(self._loong_config)
        self.args.average_tokens_across_devices = True  # the ranks of a group hold parts of one mean
        self.accelerator.prepare_data_loader = self._prepare_data_loader
        # The evaluation loop takes its gather_function from here again after each run.
        self.accelerator.gather_for_metrics = self.gather_function = self._gather_for_metrics

    def _prepare_data_loader(self, loader: Any, device_placement: bool | None = None, **unused: Any) -> Any:
        """accelerate's own, with as many readers as there are groups."""
        from accelerate.data_loader import prepare_data_loader

        a, cp = self.accelerator, self._loong_config.context_parallel_size
        prepared = prepare_data_loader(
            loader,
            a.device,
            num_processes=a.num_processes // cp,
            process_index=a.process_index // cp,
            put_on_device=a.device_placement if device_placement is None else device_placement,
            rng_types=a.rng_types.copy() if a.rng_types else None,
            dispatch_batches=False,
            even_batches=a.even_batches,
            use_seedable_sampler=a.use_seedable_sampler,
            data_seed=getattr(a.dataloader_config, "data_seed", None),
            non_blocking=a.non_blocking,
            use_stateful_dataloader=a.use_stateful_dataloader,
        )
        a._dataloaders.append(prepared)
        return prepared

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The Trainer's own. In evaluation the mean is that of this group's batch, as one rank would have it.

        (The Trainer's count over all ranks would weigh the samples that only fill up the last batch.)
        """
        if (num_items_in_batch is None or not model.training) and "shift_labels" in inputs:
            count = (inputs["shift_labels"] != NO_LABEL).sum()
            groups = self.accelerator.num_processes // self._loong_config.context_parallel_size
            num_items_in_batch = self._sum_over_group(count) * groups
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)  # type: ignore[misc]

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The loss of the group's batch, the same on all its ranks. Logits stay where they are, in parts."""
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[misc]
        return self._sum_over_group(loss) / self._loong_config.context_parallel_size, None, None

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the logits of a long sequence are on no rank."""
        raise NotImplementedError("predict does not work with loong; use evaluate for the loss, or model.generate")

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of a step."""
        return super().get_total_train_batch_size(args) // self._loong_config.context_parallel_size  # type: ignore[misc]

    def _sum_over_group(self, x: torch.Tensor) -> torch.Tensor:
        assert self._loong_groups is not None
        return gathered(x, self._loong_groups, "sums over the group").sum(0)

    def _gather_for_metrics(self, x: torch.Tensor, use_gather_object: bool = False) -> torch.Tensor:
        """accelerate's: of all ranks, without the samples that only filled up the last batch.

        A number is each rank's own part of a sum (TRL's token counts). A list of losses is one for each sample of the
        group's batch, the same on all its ranks, of whom the first is heard.
        """
        gathered = self.accelerator.gather(x)
        if x.dim() == 0:
            return gathered
        gathered = gathered.view(self.accelerator.num_processes, -1)
        gathered = gathered[:: self._loong_config.context_parallel_size].flatten()
        state = self.accelerator.gradient_state
        return gathered[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else gathered
