"""The house on virtual time: one seed is one schedule, an hour passes in milliseconds, failures replay by seed."""
