"""From run folders to tables and figures. Never imports torch."""

if __name__ != "awares_bench.reports":
    raise ImportError("import this room as awares_bench.reports, after: pip install -e .")
