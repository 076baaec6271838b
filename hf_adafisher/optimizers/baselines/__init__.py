"""What the paper compares against, where a library needs help: each module is imported when its optimizer is named."""
