"""Dataset health on Great Expectations: the only code that imports it."""
