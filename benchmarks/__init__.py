"""Speed, measured beside what else there is: never in a test, always with the command that shows it."""
