"""The engine: task data, lineages, cohorts, branching, costs."""
