"""The small package that all notebooks of the series share: LoRA and DoRA from scratch.

Each name lives in the file that explains it, and is imported from there::

    from lowrank_utils.lora import LinearWithLoRA

``python -m lowrank_utils`` checks that this machine is set up for the notebooks.
"""

__version__ = "0.1.0"
