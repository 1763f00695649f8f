"""Entry points: ``python -m jobs.<verb_noun> --config RECIPE [key=value ..]``, the same under
``ray job submit``.
"""
