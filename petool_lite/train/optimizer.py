"""bitsandbytes' paged optimizers without a wait for the GPU after every tensor."""

from typing import Any


def unhurried(kind: Any) -> Any:
    """`kind`, an optimizer's class, or, of bitsandbytes, a subclass whose step waits for the GPU once, at its end.

    bitsandbytes waits after each tensor, and an adapter has hundreds of small ones. Kernels and prefetches of one
    stream run in order, so only who reads paged states next must wait.
    """
    if not kind.__module__.startswith("bitsandbytes."):
        return kind
    import torch

    class Unhurried(kind):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            if not self.initialized:
                self.check_overrides()
                self.to_gpu()
                self.initialized = True
            for number, group in enumerate(self.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, place)
                    self.prefetch_state(parameter)
                    self.update_step(group, parameter, number, place)
            if self.is_paged and torch.cuda.is_available():
                torch.cuda.synchronize()

    Unhurried.__name__, Unhurried.__module__ = (
        kind.__name__,
        kind.__module__,
    )  # transformers looks for the library's name
    return Unhurried
