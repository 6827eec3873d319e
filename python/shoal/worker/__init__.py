"""The worker: one process that serves one model with transformers, its memory elastic.

From the outside in: :mod:`~shoal.worker.__main__` (the program), :mod:`~shoal.worker.http` (OpenAI's API, with
:mod:`~shoal.worker.parsing`, :mod:`~shoal.worker.chat`, :mod:`~shoal.worker.stopping`), the engines
(:mod:`~shoal.worker.engine_causal` with :mod:`~shoal.worker.scheduling` and :mod:`~shoal.worker.sampling`,
:mod:`~shoal.worker.engine_embedding`), what they hook into (:mod:`~shoal.worker.hooks`, :mod:`~shoal.worker.kv`), and
the seam to memory (:mod:`~shoal.worker.memory`).
"""
