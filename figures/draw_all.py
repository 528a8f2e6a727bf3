"""Draw all figures again: ``python figures/draw_all.py`` writes every SVG beside its
script.
"""

from importlib import import_module

from alt_texts import ALT_TEXTS

if __name__ == "__main__":
    for name in ALT_TEXTS:
        import_module(name).draw()
