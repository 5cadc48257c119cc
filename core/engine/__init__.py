"""From ids to ids. Reading order: base, torch_engine, scheduler, kv_cache, sequence, guesses, model_runner, model,
sampler, draft; weights and hub bring checkpoints, native/ is the same step in C++, graphs is it for CUDA, reference is
the model written down plainly, which a precision is held against; server, process and http_engine put it elsewhere.
"""
