"""The memory: store, catalogue, SQL, cards and reports. Never imports torch."""
