"""The step in C++: step.cpp computes, library.py finds and describes it, memory.py gives room in large pages, gpt2.py
is the model on top.

The sampler's passes over the whole vocabulary are in step.cpp too, for logits of every kind.
"""
