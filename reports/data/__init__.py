"""From run folders to one frame of documents, with the reasons not to compare and the paper's numbers."""
