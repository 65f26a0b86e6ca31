"""llama.cpp by its C interface: llama_decode and argmax. Its Python wrapper's own loop costs more than the library."""

import engine


class Run:
    """A model, and a context of `batch` sequences."""

    def __init__(self, path, batch, count):
        import ctypes

        import llama_cpp as lib

        self.lib = lib
        self.silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.silence, ctypes.c_void_p(0))
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = 1024 * batch, 512, 512, batch
        options.n_threads = options.n_threads_batch = count
        self.context = lib.llama_init_from_model(self.model, options)
        self.width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(512, 0, 1)

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def read(self, rows, start):
        """The ids `rows[b]`, equally many of each sequence, from position `start`; the next id of each."""
        import ctypes

        import numpy as np

        batch, at, last = self.batch, 0, []
        for b, row in enumerate(rows):
            for t, id in enumerate(row):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = id, start + t, 1, b
                batch.logits[at] = t == len(row) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        kind = ctypes.POINTER(ctypes.c_float)
        scores = (ctypes.cast(self.lib.llama_get_logits_ith(self.context, i), kind) for i in last)
        return [int(np.ctypeslib.as_array(s, (self.width,)).argmax()) for s in scores]


def setups(case, batch, call):
    import numpy as np

    path = engine.gguf_file(case)
    if path is None:
        return None
    found = []
    for count in sorted({1, engine.threads()}):
        run = Run(path, batch, count)
        found.append(engine.named(lambda run=run: np.array(call(run)), f"{case['kind']}, {count} threads", run))
    return engine.best(found)


def decode(case):
    rows = engine.prompts(case)

    def call(run):
        run.clear()
        out = [run.read(rows, 0)]
        while len(out) < engine.NEW:
            out.append(run.read([[id] for id in out[-1]], engine.PROMPT + len(out) - 1))
        return list(zip(*out, strict=True))

    return setups(case, len(rows), call)


def prompt(case):
    rows = [engine.prompt_ids(case["tokens"])]

    def call(run):
        run.clear()
        return run.read(rows, 0)

    return setups(case, 1, call)
