"""Tests of `hf_adafisher.fisher`."""
