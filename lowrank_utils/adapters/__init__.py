"""Adapters at work: on disk in PEFT's files, and several of them in one running model.

``config`` and ``files`` read and write an adapter, ``bank`` serves many.
"""

from lowrank_utils.adapters.bank import AdapterBank
from lowrank_utils.adapters.files import load_adapter, save_adapter

__all__ = ["AdapterBank", "load_adapter", "save_adapter"]
