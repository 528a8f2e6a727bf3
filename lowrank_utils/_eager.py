"""torch's Adam, without the second or two that its compiler takes to load."""

import inspect

import torch


class EagerAdam(torch.optim.Adam):
    """torch's Adam for training without ``torch.compile``.

    Torch keeps its compiler away from these two methods by decorators that load the
    compiler first. That is a second or two at the first step of every process, as long
    as many a training here. Below the decorators are the same methods.
    """

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
