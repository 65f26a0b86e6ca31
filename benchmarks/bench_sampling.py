"""One token from a row of logits: the roof is one pass over the row, with a comparison for each of them."""

RANDOM = ("transformers", "llama_cpp")  # they draw with their own numbers


def work(both, logits, **_):
    return logits.size, logits.nbytes


def ours(**inputs):
    from fastlm import ops

    return ops.sample(**inputs)


def transformers(logits, temperature, top_k, top_p, min_p, repetition_penalty, previous, uniform):
    """The processors and the draw that `generate` would build for these settings."""
    import torch
    from transformers.generation import logits_process as p

    ids, scores = previous.long(), logits
    if repetition_penalty != 1:
        scores = p.RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, scores)
    if temperature == 0:
        return scores.argmax(dim=-1).int()
    if temperature != 1:
        scores = p.TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = p.TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = p.TopPLogitsWarper(top_p)(ids, scores)
    if min_p > 0:
        scores = p.MinPLogitsWarper(min_p)(ids, scores)
    return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0].int()


def llama_cpp(logits, temperature, top_k, top_p, min_p, repetition_penalty, previous, uniform):
    """A sampler chain on an array of candidates; filling that array belongs to it, as in llama_sampler_sample."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    if logits.shape[0] != 1 or repetition_penalty != 1:
        return None
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    steps = [lib.llama_sampler_init_greedy()] if temperature == 0 else []
    if temperature != 0:
        steps += [lib.llama_sampler_init_top_k(top_k)] if top_k else []
        steps += [lib.llama_sampler_init_top_p(top_p, 1)] if top_p < 1 else []
        steps += [lib.llama_sampler_init_min_p(min_p, 1)] if min_p > 0 else []
        steps += [lib.llama_sampler_init_temp(temperature), lib.llama_sampler_init_dist(1)]
    for step in steps:
        lib.llama_sampler_chain_add(chain, step)
    fresh = np.zeros(logits.shape[1], [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
    fresh["id"], fresh["logit"] = np.arange(logits.shape[1]), logits[0]
    used = fresh.copy()
    candidates = lib.llama_token_data_array()
    pointer = ctypes.cast(used.ctypes.data, ctypes.POINTER(lib.llama_token_data))

    def draw():
        np.copyto(used, fresh)
        candidates.data, candidates.size, candidates.selected, candidates.sorted = pointer, used.size, -1, False
        lib.llama_sampler_apply(chain, ctypes.byref(candidates))
        return np.array([candidates.data[candidates.selected].id], np.int32)

    return draw
