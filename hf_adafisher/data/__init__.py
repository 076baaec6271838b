"""Training and evaluation data: ``hf_adafisher.data.text`` and ``hf_adafisher.data.images``.

Imports nothing else of this package.
"""
