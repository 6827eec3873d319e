import importlib
import queue
import threading
from types import SimpleNamespace

from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched import Request, Scheduler
from vllm.v1.engine import EngineCoreRequestType


class EngineCoreProc:
    def __init__(self, config, pipe):
        module, _, name = config.worker_cls.rpartition(".")
        worker = getattr(importlib.import_module(module), name)
        self.input_queue = queue.Queue()
        self.pipe = pipe
        self.worker = worker(config)
        self.worker.init_device()
        self.worker.load_model()
        available = self.worker.determine_available_memory()
        specs = self.worker.get_kv_cache_spec()
        groups = [SimpleNamespace(kv_cache_spec=next(iter(specs.values())), layer_names=list(specs))]
        kv_config = kv_cache_utils.get_kv_cache_config(config, groups, available)
        blocks = kv_config.num_blocks
        self.worker.initialize_from_config(kv_config)
        self.worker.compile_or_warm_up_model()
        self.scheduler = Scheduler(blocks, config.scheduler_config.max_num_seqs, config.caches)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        while True:
            try:
                self.input_queue.put(self.pipe.recv())
            except EOFError:
                self.input_queue.put((EngineCoreRequestType.UTILITY, (None, "end", ())))
                return

    def _notify_idle_state_callbacks(self):
        pass

    def run_busy_loop(self):
        while True:
            while not self.scheduler.has_requests():
                self._notify_idle_state_callbacks()
                self._handle(*self.input_queue.get())
            while not self.input_queue.empty():
                self._handle(*self.input_queue.get_nowait())
            scheduled = self.scheduler.schedule()
            if scheduled:
                self.worker.execute_model(scheduled)
                tokens = self.worker.sample_tokens(None)
                for of_client in self.scheduler.update_from_output(scheduled, tokens).values():
                    made = [
                        (one.request_id, one.new_token_ids, one.is_done, one.num_cached_tokens)
                        for one in of_client.outputs
                    ]
                    self.pipe.send(("outputs", made))

    def _handle(self, kind, said):
        if kind is EngineCoreRequestType.ADD:
            self.scheduler.waiting.append(Request(*said))
        elif kind is EngineCoreRequestType.UTILITY:
            number, method, arguments = said
            if number is None:
                raise SystemExit
            if method == "preemptions":
                self.pipe.send(("result", number, self.scheduler.preemptions))
                return
            try:
                self.pipe.send(("result", number, [getattr(self.worker, method)(*arguments)]))
            except Exception as error:  # noqa: BLE001
                self.pipe.send(("failed", number, str(error)))


def run_engine_core(config, pipe):
    engine = EngineCoreProc(config, pipe)
    pipe.send(("ready",))
    engine.run_busy_loop()
