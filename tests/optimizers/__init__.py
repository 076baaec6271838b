"""Tests of `hf_adafisher.optimizers`."""
