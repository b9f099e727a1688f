"""The laboratory that made nano from scratch: tower, language stages, data of its rivals, ablations."""
