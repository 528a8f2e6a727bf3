"""The comparison of the series: methods, tasks, the protocol that treats all alike,
statistics, and the sweep.

``lowrank-compare``, the command, is in ``command``. This file imports nothing, since
the workers of a sweep need neither torch nor pandas.
"""
