"""The serving benchmark: Palaver's engine beside what else runs a DialoGPT. `python -m benchmarks.serve --help`

Reading order: workloads (what is asked), peers (who answers), checkpoints (what they load), child (one peer's turn),
machine (what the hardware allows), report (tables and plots), __main__ (rounds).
"""
