"""CTranslate2: int8 or float32, in batches of at most 16 equally long prompts; it keeps no cache between two calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ctranslate2

from benchmarks.serve.peers import SAMPLING, Asked, Batcher, refuse_unusual


class CTranslate2(Batcher):
    equal = True

    def convert(self) -> None:
        refuse_unusual(self.folder, "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx")
        if not (self.path / "config.json").is_file():  # it is written last
            part = self.path.with_suffix(".part")
            converter = ctranslate2.converters.TransformersConverter(str(self.folder))
            converter.convert(str(part), quantization=self.kind, force=True)
            shutil.rmtree(self.path, ignore_errors=True)
            part.rename(self.path)

    @property
    def path(self) -> Path:
        return self.folder / f"ctranslate2-{self.kind}"

    def load(self) -> str:
        path = self.path
        self._words: list[str] = json.loads((path / "vocabulary.json").read_text("utf-8"))
        self._model = ctranslate2.Generator(
            str(path), device="cpu", compute_type=self.kind, inter_threads=1, intra_threads=self.threads
        )
        return f"{self._model.compute_type}, batches of up to {self.limit} of a length"

    def run(self, batch: list[Asked]) -> list[list[list[int]]]:
        results = self._model.generate_batch(
            [[self._words[id] for id in asked.prompt] for asked in batch],
            max_length=batch[0].tokens,
            min_length=batch[0].tokens,
            num_hypotheses=batch[0].candidates,
            sampling_topk=SAMPLING.top_k,
            sampling_topp=SAMPLING.top_p,
            sampling_temperature=SAMPLING.temperature,
            include_prompt_in_result=False,
        )
        return [[list(ids) for ids in result.sequences_ids] for result in results]
