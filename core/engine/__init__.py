"""From ids to ids. Reading order: base, torch_engine, scheduler, kv_cache, sequence, model_runner, model, sampler."""
