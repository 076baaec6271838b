"""The commands of ``hf-adafisher``, one file each; ``main.py`` has their table."""
