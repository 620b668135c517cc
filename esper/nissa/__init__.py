"""Telemetry: events and the sinks that write them."""
