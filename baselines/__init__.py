"""One method per file; the file name is the name of the method everywhere."""

if __name__ != "awares_bench.baselines":
    raise ImportError("import this room as awares_bench.baselines, after: pip install -e .")
