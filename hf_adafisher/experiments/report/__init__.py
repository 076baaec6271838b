"""Results of comparisons as tables, pictures and HTML."""
