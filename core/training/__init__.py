"""Making models: `datasets` reads dialogues, `finetune` trains, `tiny` expands the corpus into the embedded model."""
