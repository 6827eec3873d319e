"""As much of vLLM's scheduler as it takes to run out of blocks, preempt and find prefixes."""

from types import SimpleNamespace

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

TOKENS = 16


class Request:
    def __init__(self, request_id, prompt, most, cache_salt=None):
        self.request_id, self.most, self.cache_salt = request_id, most, cache_salt
        self.prompt = len(prompt)
        self.tokens = list(prompt)
        self.blocks = []
        self.owned = []
        self.computed = self.cached = self.num_preemptions = 0

    def hashes(self):
        found, before = [], self.cache_salt
        for at in range(0, len(self.tokens) // TOKENS * TOKENS, TOKENS):
            before = hash((before, *self.tokens[at : at + TOKENS]))
            found.append(before)
        return found


class Output:
    def __init__(self, request, token, is_done):
        self.request_id, self.new_token_ids, self.is_done = request.request_id, [token], is_done
        self.num_cached_tokens = request.cached


class Outputs:
    def __init__(self, outputs):
        self.outputs = outputs


class SchedulerOutput(list):
    """The requests of a step, with what vLLM says of them."""

    def __init__(self, requests, begun):
        super().__init__(requests)
        # As for the V2 runner: those that were preempted are among them.
        self.scheduled_new_reqs = [SimpleNamespace(req_id=request.request_id) for request in begun]
        self.scheduled_cached_reqs = SimpleNamespace(resumed_req_ids=set())
        self.num_scheduled_tokens = {request.request_id: len(request.tokens) - request.computed for request in requests}
        self.total_num_scheduled_tokens = sum(self.num_scheduled_tokens.values())
        self.scheduled_spec_decode_tokens, self.scheduled_encoder_inputs = {}, {}


class Scheduler:
    def __init__(self, blocks, most, caches):
        self.coordinator = KVCacheCoordinator(blocks, caches)
        self.pool = self.coordinator.block_pool
        self.waiting, self.running, self.most = [], [], most
        self.preemptions = 0

    @property
    def requests(self):
        return {request.request_id: request for request in self.waiting + self.running}

    def get_request_counts(self):
        return len(self.running), len(self.waiting)

    def has_requests(self):
        return bool(self.waiting or self.running)

    def _secure(self, request):
        number = self.coordinator.get_num_blocks_to_allocate(request, len(request.tokens))
        if number <= 0:
            return True
        if number > self.pool.get_num_free_blocks():
            return False
        new = self.pool.get_new_blocks(number)
        request.owned += new
        request.blocks += [block.block_id for block in new]
        return True

    def _free(self, request):
        self.pool.free_blocks(reversed(request.owned))
        request.owned, request.blocks, request.computed = [], [], 0

    def schedule(self):
        scheduled, begun = [], []
        for request in list(self.running):
            while request in self.running and not self._secure(request):
                victim = self.running.pop()
                self._free(victim)
                self.preemptions += 1
                victim.num_preemptions += 1
                self.waiting.insert(0, victim)
            if request in self.running:
                scheduled.append(request)
        while self.waiting and len(self.running) < self.most:
            request = self.waiting[0]
            found = []
            for block_hash in request.hashes()[: (len(request.tokens) - 1) // TOKENS]:
                block = self.pool.get_cached_block(block_hash)
                if block is None:
                    break
                found.append(block)
            self.pool.touch(found)
            request.owned, request.blocks = list(found), [block.block_id for block in found]
            if not self._secure(request):
                self._free(request)
                break
            request.computed = request.cached = len(found) * TOKENS
            self.running.append(self.waiting.pop(0))
            begun.append(request)
        known = [request for request in scheduled if request in self.running]
        return SchedulerOutput(known + begun, begun)

    def update_from_output(self, scheduled, tokens):
        outputs = []
        for request in scheduled:
            request.computed = len(request.tokens)
            self.pool.cache_full_blocks(request.owned, request.hashes())
            token = tokens[request.request_id]
            request.tokens.append(token)
            is_done = len(request.tokens) - request.prompt >= request.most
            outputs.append(Output(request, token, is_done))
            if is_done:
                self.running.remove(request)
                self._free(request)
        return {0: Outputs(outputs)} if outputs else {}
