"""Labelled images: files, data sets, augmentation and metrics."""
