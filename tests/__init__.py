"""Tests of hf_adafisher; the folders mirror the package.

The folders need no such file; this one is there since a `tests` package elsewhere on the path would hide a folder
without it.
"""
