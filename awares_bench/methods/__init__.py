"""What a method is, and what an exchange between a method and a model is: needs no torch."""
