"""Controllers: rules, schedules, behaviours and learned policies."""
