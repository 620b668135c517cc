"""Esper grows neural networks while they train."""
