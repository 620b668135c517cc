"""Contracts: everything that the other packages must agree on. No torch."""
