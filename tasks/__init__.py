"""The paper's six benchmarks as a group, and the nano suite: its renderer, its YAML and its parquet."""

if __name__ != "awares_bench.tasks":
    raise ImportError("import this room as awares_bench.tasks, after: pip install -e .")
