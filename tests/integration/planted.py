"""Faults to plant in a rank before it trains, for tests that show that the net finds them. No tests."""

from __future__ import annotations

from typing import Any


def mean_for_sum() -> None:
    """A hook returns the mean over the ranks where the sum is right."""
    from megatron_loong.integration import loss

    total = loss.sum_over
    loss.sum_over = lambda x, group: total(x, group) / group.size()


def wrong_position() -> None:
    """The tokens of the last rank are taken for those one further on in their document."""
    from megatron_loong.integration import packed

    original = packed.local_places

    def shifted(config: Any, cp_rank: int, *args: Any) -> Any:
        places = original(config, cp_rank, *args)
        return places._replace(in_document=places.in_document + (cp_rank == config.context_parallel_size - 1))

    packed.local_places = shifted


def dropped_gradient() -> None:
    """One context-parallel rank forgets the gradient of its keys."""
    from megatron_loong.attention import call

    original = call.backward_pass

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        gradients: list[Any] = list(original(*args, **kwargs))
        groups = next(x.groups for x in (*args, *kwargs.values()) if hasattr(x, "groups"))
        gradients[1] = gradients[1] * (groups.cp_rank != 1)
        return tuple(gradients)

    call.backward_pass = forgetful


def unmarked_sinks() -> None:
    """The sinks of a tensor-parallel rank are not marked as its own part, as Megatron's attentions leave theirs."""
    from megatron_loong.integration import core_attention

    core_attention.set_tensor_model_parallel_attributes = lambda *args: None


def lost_image_gradients() -> None:
    """What other ranks' tokens say of an image does not come back to the rank that encoded it."""
    from megatron_loong.multimodal import join

    original = join._Exchange.backward

    def forgetful(ctx: Any, *gradients: Any) -> Any:
        rows, *others = original(ctx, *gradients)
        kept = rows.new_zeros(rows.shape)
        own = slice(sum(ctx.plan.send_counts[: ctx.handle.rank]), sum(ctx.plan.send_counts[: ctx.handle.rank + 1]))
        kept[own] = rows[own]
        return kept, *others

    join._Exchange.backward = staticmethod(forgetful)  # type: ignore[method-assign]


FAULTS = {one.__name__: one for one in (mean_for_sum, wrong_position, dropped_gradient, unmarked_sinks)}


def only_sinks() -> None:
    """No fault: all parameters but the sinks are frozen, and their gradients are large enough to be clipped at 1."""
    from megatron.core.models.gpt import GPTModel

    original = GPTModel.__init__

    def frozen(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("softmax_offset" in name)
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: 1000 * gradient)

    GPTModel.__init__ = frozen
