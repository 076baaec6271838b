"""The commands of ``hf-adafisher figures``, one file each."""
