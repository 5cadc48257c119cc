"""The bench of proof: kills, crash points, hostile inputs, bursts; afterwards the platforms' ledgers are counted."""
