"""Wire servers that the real client libraries talk to, and a chat that only listens."""
