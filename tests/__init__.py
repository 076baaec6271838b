"""Tests of hf_adafisher; the folders mirror the package."""
