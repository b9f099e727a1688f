"""Training: SFT and GRPO of a method's exchanges, curation of their data, auxiliary models, and nano from scratch."""

if __name__ != "awares_bench.training":
    raise ImportError("import this room as awares_bench.training, after: pip install -e .")
