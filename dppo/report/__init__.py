"""The comparison report: figures, tables and a page from finished runs."""
