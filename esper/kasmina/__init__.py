"""Hosts, seeds and blueprints."""
