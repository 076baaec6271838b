"""Tests of `hf_adafisher.training`."""
