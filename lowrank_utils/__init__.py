"""The small package that all notebooks of the series share: LoRA and DoRA from scratch.

Each name lives in the file that explains it. It can be imported from there, as the
notebooks do, or from here, where it is loaded when it is first used::

    from lowrank_utils.lora import LinearWithLoRA
    from lowrank_utils import LinearWithLoRA

``__init__.pyi`` lists the names. What belongs to the comparison, to the exercises' checks
and to pictures with sliders stays in its place. ``python -m lowrank_utils`` checks that
this machine is set up for the notebooks.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
