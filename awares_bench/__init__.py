"""awares-bench: how few visual tokens does a vision-language model need?"""

__version__ = "0.1.0"
