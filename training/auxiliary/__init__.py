"""Training of the second models that some methods ask: CropVLM's cropper, CARES' gate."""
